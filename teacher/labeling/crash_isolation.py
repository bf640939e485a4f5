"""Find the images of a shard that crash or hang the decoder, by decoding them one by one in a child process.

For shards at which workers were lost. An image that crashes a decoder is a bug of the decoder, but no reason to stop labeling.
"""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from data.images.clean_view import EvalView
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import Shard
from teacher.labeling.batches import Meter

_START_S = 120  # limit for a child process to load its libraries


def crashing_images(shard: Shard, view: EvalView, patience_s: float, meter: Meter) -> dict[int, str]:
    """Decode a shard in a child process; start a new one after each crash.

    Args:
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
    while start < shard.num_samples:
        start, reason = _first_crash(shard, view, start, patience_s, meter)
        if reason:
            found[start] = reason
            start += 1
    return found


def _first_crash(shard: Shard, view: EvalView, start: int, patience_s: float, meter: Meter) -> tuple[int, str]:
    """(ordinal, reason) of the first image from `start` on that crashes or hangs; (num_samples, "") if none does."""
    context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_decode, args=(shard, view, start, sender), daemon=True)
    child.start()
    sender.close()
    try:
        _wait_for_start(shard, receiver, meter)
        _receive(receiver, child)
        for ordinal in range(start, shard.num_samples):
            with meter.timing("read"):
                _receive(receiver, child)
            with meter.timing("decode"):
                if not receiver.poll(patience_s):
                    return ordinal, f"decoding it takes more than {patience_s:g} s"
                try:
                    _receive(receiver, child)
                except _EndedError as ending:
                    return ordinal, f"decoding it ended the process ({ending})"
        return shard.num_samples, ""
    except _EndedError as ending:
        raise RuntimeError(
            f"{shard.url}: a process that decodes it alone ended between two images ({ending})"
        ) from ending
    finally:
        receiver.close()
        child.kill()
        child.join()


class _EndedError(Exception):
    """A child process ended; the message is the signal's name or the exit code."""


def _wait_for_start(shard: Shard, receiver: Connection, meter: Meter) -> None:
    for _ in range(_START_S):
        with meter.timing("read"):  # one second at a time: the pool must see progress
            if receiver.poll(1.0):
                return
    raise RuntimeError(f"{shard.url}: a process that decodes it alone did not start within {_START_S} s")


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


def _decode(shard: Shard, view: EvalView, start: int, sender: Connection) -> None:
    """Runs in the child. Sends None when it has started, and after reading and after decoding each image; or the error."""
    with suppress(BrokenPipeError):
        try:
            places = places_in(shard.index().slice(start), start)
            with ImageReader([shard.url]) as reader:
                sender.send(None)
                for place in places:
                    content = reader.image(0, place)
                    sender.send(None)
                    if content:
                        with suppress(DecodeError):
                            view.with_hash(content)
                    sender.send(None)
        except Exception as error:  # not a crash: labeling in the actor would raise it too
            sender.send(error)
