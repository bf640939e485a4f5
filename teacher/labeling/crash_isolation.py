"""Which images of a shard kill or hang the process that decodes them: found in processes of their own, one image after the other.

For shards that workers were lost at. An image that makes a decoder crash is a bug in the decoder, but no reason to stop.
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

_START_S = 120  # for a process to load its libraries


def crashing_images(shard: Shard, view: EvalView, patience_s: float, meter: Meter) -> dict[int, str]:
    """Decode a shard in a child process, and in a new one after each that ends.

    Args:
        patience_s: to decode one image; reading it does not count.
        meter: accounts the time to `read` and `decode`, which shows that this goes on.

    Returns:
        What happened, by ordinal.

    Raises:
        RuntimeError: a child process could not be started, or ended while it decoded nothing: that is no image's fault.
        What reading or decoding raises, as when the shard is labeled without such care.
    """
    found: dict[int, str] = {}
    start = 0
    while start < shard.num_samples:
        start, what = _try(shard, view, start, patience_s, meter)
        if what:
            found[start] = what
            start += 1
    return found


def _try(shard: Shard, view: EvalView, start: int, patience_s: float, meter: Meter) -> tuple[int, str]:
    """The first image from `start` on that cannot be got over, and why; or the end of the shard, and nothing."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
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
    """A child process is gone; the message is the signal's name or the exit code."""


def _wait_for_start(shard: Shard, receiver: Connection, meter: Meter) -> None:
    for _ in range(_START_S):
        with meter.timing("read"):  # a second at a time: whoever looks for progress sees some
            if receiver.poll(1.0):
                return
    raise RuntimeError(f"{shard.url}: a process that decodes it alone did not start within {_START_S} s")


def _receive(receiver: Connection, child: BaseProcess) -> None:
    """Wait for the child's next word; raises the error that is one."""
    try:
        word = receiver.recv()
    except EOFError as error:
        child.join()
        code = child.exitcode or 0
        raise _EndedError(signal.Signals(-code).name if code < 0 else f"exit code {code}") from error
    if isinstance(word, Exception):
        raise word


def _decode(shard: Shard, view: EvalView, start: int, sender: Connection) -> None:
    """Runs in the child: says that it is there, and of each image when it is read and when it is over; or what went wrong."""
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
        except Exception as error:  # no image's fault: labeling without such care would raise it, too
            sender.send(error)
