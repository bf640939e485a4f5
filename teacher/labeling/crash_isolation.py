"""Find the images that crash or hang the decoder, by decoding them one by one in a child process.

For shards at which a process was lost. An image that crashes a decoder is a bug of the decoder, but no reason to stop labeling.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from data import storage
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.split import Shard
from teacher.labeling.batches import Meter, View

_START_S = 120  # limit for a child process to load its libraries
OpenImages = Callable[[], AbstractContextManager[tuple[Sequence[Place], Callable[[Place], bytes]]]]
"""Opens images: their places, and a function that reads one. Pickled, as the child opens them."""


@contextmanager
def open_shard(shard: Shard) -> Iterator[tuple[Sequence[Place], Callable[[Place], bytes]]]:
    """Open the images of a shard; see `OpenImages`."""
    with ImageReader([shard.url]) as reader:
        yield places_in(shard.index()), lambda place: reader.image(0, place)


@contextmanager
def noting_loss(url: str) -> Iterator[bool]:
    """Yield whether a process was lost in this block: an empty file at `url`, which only a killed process leaves behind, tells."""
    was_lost = storage.exists(url)
    if not was_lost:
        storage.write_text(url, "")
    try:
        yield was_lost
    finally:
        storage.remove(url)


def crashing_images(
    name: str, number: int, images: OpenImages, view: View, patience_s: float, meter: Meter
) -> dict[int, str]:
    """Decode images in a child process; start a new one after each crash.

    Args:
        name: of the images, for messages.
        number: of the images.
        patience_s: seconds to decode one image, without reading it.
        meter: counts the time as `read` and `decode`, so that the pool sees progress.

    Returns:
        The reason by ordinal.

    Raises:
        RuntimeError: a child process did not start, or ended between two images.
        DataError, OSError, StorageError: the shard cannot be read, as when it is labeled in the actor.
    """
    found: dict[int, str] = {}
    start = 0
    while start < number:
        start, reason = _first_crash(name, range(start, number), images, view, patience_s, meter)
        if reason:
            found[start] = reason
            start += 1
    return found


def _first_crash(
    name: str, rows: range, images: OpenImages, view: View, patience_s: float, meter: Meter
) -> tuple[int, str]:
    """(row, reason) of the first of some images that crashes or hangs; the end of the rows and "" if none does."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_decode, args=(images, rows, view, sender), daemon=True)
    child.start()
    sender.close()
    try:
        _wait_for_start(name, receiver, meter)
        _receive(receiver, child)
        for row in rows:
            with meter.timing("read"):
                _receive(receiver, child)
            with meter.timing("decode"):
                if not receiver.poll(patience_s):
                    return row, f"decoding it takes more than {patience_s:g} s"
                try:
                    _receive(receiver, child)
                except _EndedError as ending:
                    return row, f"decoding it ended the process ({ending})"
        return rows.stop, ""
    except _EndedError as ending:
        raise RuntimeError(f"{name}: a process that decodes it alone ended between two images ({ending})") from ending
    finally:
        receiver.close()
        child.kill()
        child.join()


class _EndedError(Exception):
    """A child process ended; the message is the signal's name or the exit code."""


def _wait_for_start(name: str, receiver: Connection, meter: Meter) -> None:
    for _ in range(_START_S):
        with meter.timing("read"):  # one second at a time: the pool must see progress
            if receiver.poll(1.0):
                return
    raise RuntimeError(f"{name}: a process that decodes it alone did not start within {_START_S} s")


def _receive(receiver: Connection, child: BaseProcess) -> None:
    """Wait for the child's next message; raise it if it is an error."""
    try:
        message = receiver.recv()
    except EOFError as error:
        child.join()
        code = child.exitcode or 0
        raise _EndedError(signal.Signals(-code).name if code < 0 else f"exit code {code}") from error
    if isinstance(message, Exception):
        raise message


def _decode(images: OpenImages, rows: range, view: View, sender: Connection) -> None:
    """Runs in the child. Sends None when it has started, and after reading and after decoding each image; or the error."""
    with suppress(BrokenPipeError):
        try:
            with images() as (places, read):
                sender.send(None)
                for row in rows:
                    content = read(places[row])
                    sender.send(None)
                    if content:
                        with suppress(DecodeError):
                            view.with_hash(content)
                    sender.send(None)
        except Exception as error:  # not a crash: labeling in the actor would raise it too
            sender.send(error)
