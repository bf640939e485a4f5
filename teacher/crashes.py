"""Which images of a shard kill or hang the process that decodes them: found in processes of their own, one image after the other.

For shards that workers were lost at. An image that makes a decoder crash is a bug in the decoder, but no reason to stop.
"""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from data.images import DecodeError
from data.manifest import Shard
from data.reader import ImageReader
from data.view import EvalView
from teacher.batches import Meter

_START_S = 120.0  # for a process to load its libraries


def crashing_images(shard: Shard, view: EvalView, patience_s: float, meter: Meter) -> dict[int, str]:
    """Decode a shard in child processes, a new one after each that ends.

    Args:
        patience_s: for one image.
        meter: each image's time is accounted there, as decoding, which shows that this goes on.

    Returns:
        What happened, by ordinal.

    Raises:
        RuntimeError: a child process could not be started.
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
        if not receiver.poll(_START_S):
            raise RuntimeError(f"{shard.url}: a process that decodes it alone did not start within {_START_S:g} s")
        receiver.recv()
        for ordinal in range(start, shard.num_samples):
            with meter.timing("decode"):
                if not receiver.poll(patience_s):
                    return ordinal, f"decoding it takes more than {patience_s:g} s"
                try:
                    receiver.recv()
                except EOFError:
                    return ordinal, f"decoding it ended the process ({_ending(child)})"
        return shard.num_samples, ""
    except EOFError as error:
        raise RuntimeError(
            f"{shard.url}: a process that decodes it alone ended as it started ({_ending(child)})"
        ) from error
    finally:
        receiver.close()
        child.kill()
        child.join()


def _ending(child: BaseProcess) -> str:
    child.join()
    code = child.exitcode or 0
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _decode(shard: Shard, view: EvalView, start: int, sender: Connection) -> None:
    """Runs in the child: says that it is there, and then when each image is over."""
    index = shard.index()
    columns = (index.column(name).slice(start).to_pylist() for name in ("offset", "size", "problem"))
    with suppress(BrokenPipeError), ImageReader([shard.url]) as reader:
        sender.send(None)
        for offset, size, problem in zip(*columns, strict=True):
            if not problem:
                with suppress(DecodeError):
                    view.with_hash(reader.read(0, offset, size))
            sender.send(None)
