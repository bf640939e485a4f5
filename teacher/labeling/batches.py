"""A shard as batches that are ready for the model: read in long pieces, decoded in threads, ahead of the model.

Batches are consecutive samples and never cross shards, so what is in them depends on the shard and the batch size alone.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa

from data.images.clean_view import EvalView
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import Shard

Item = TypeVar("Item")
_CHUNK = 32  # images per task of a decoding thread: little to schedule, little to wait for at the end of a batch
_AHEAD = 2  # batches that are read and being decoded while the model works on another
_END = object()


class Meter:
    """Images done, and seconds spent in `read`, `decode`, `model` and `write`, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._images = 0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Account the block's time to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[part] += time.perf_counter() - started

    def add_images(self, number: int) -> None:
        """Count images as done, quarantined ones included."""
        with self._lock:
            self._images += number

    def read(self) -> tuple[int, dict[str, float]]:
        """Images and seconds so far."""
        with self._lock:
            return self._images, dict(self._seconds)


class ImageMemory:
    """Memory for the images of batches, used again: to get fresh pages for each takes a twentieth of all time.

    Args:
        batch_size: images of a batch, at most.
        image_size: their side, pixels.
    """

    def __init__(self, batch_size: int, image_size: int) -> None:
        self._shape = (batch_size, image_size, image_size, 3)
        self._free: list[np.ndarray] = []

    def take(self, number: int) -> np.ndarray:
        """For `number` images, with anything in it: uint8 (number, image_size, image_size, 3)."""
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self._shape, np.uint8)
        return whole[:number]

    def give_back(self, images: np.ndarray) -> None:
        """What `take` returned, when nobody reads it any more."""
        assert images.base is not None
        self._free.append(images.base)


@dataclass
class Batch:
    """Consecutive samples of a shard, each of them decoded or with a reason why not.

    Attributes:
        start: ordinal of the first one.
        images: uint8 (N, S, S, 3); anything where there is a problem.
        hashes: uint64 (N,).
        problems: (N,) reasons, empty where the image is fine.
    """

    start: int
    images: np.ndarray
    hashes: np.ndarray
    problems: list[str]
    pending: list[Future[None]] = field(default_factory=list)

    @property
    def is_good(self) -> np.ndarray:
        """Images without a problem, once they are decoded: bool (N,)."""
        return np.array([not problem for problem in self.problems])

    def wait(self) -> None:
        """Until every image is decoded; raises what decoding raised, other than DecodeError."""
        for future in self.pending:
            future.result()


def submitted_batches(
    shard: Shard,
    index: pa.Table,
    view: EvalView,
    batch_size: int,
    pool: ThreadPoolExecutor,
    turn: threading.Lock,
    meter: Meter,
    memory: ImageMemory,
) -> Iterator[Batch]:
    """The shard's batches, in order, each read and on its way through `pool`.

    Args:
        index: the shard's.
        pool: decodes.
        memory: from where the batches' images have theirs; who takes a batch gives it back.
        turn: held while the shard is read. The next shard's reading begins as this one's last batches go through the model.

    Raises:
        DataError: the shard is shorter than its index says, or another one.
    """
    with turn, ImageReader([shard.url]) as reader:
        for start in range(0, index.num_rows, batch_size):
            part = index.slice(start, batch_size)
            wanted, problems = places_in(part, start), part.column("problem").to_pylist()
            with meter.timing("read"):
                contents = reader.images(0, wanted)
            batch = Batch(start, memory.take(len(wanted)), np.zeros(len(wanted), np.uint64), problems)
            for first in range(0, len(wanted), _CHUNK):
                rows = range(first, min(first + _CHUNK, len(wanted)))
                batch.pending.append(pool.submit(_decode, batch, rows, contents, view, meter))
            yield batch


def _decode(batch: Batch, rows: range, contents: list[bytes], view: EvalView, meter: Meter) -> None:
    with meter.timing("decode"):
        for row in rows:
            if batch.problems[row]:
                continue
            try:
                batch.images[row], batch.hashes[row] = view.with_hash(contents[row])
            except DecodeError as error:
                batch.problems[row] = str(error)


def ahead(items: Iterator[Item], depth: int = _AHEAD) -> Iterator[Item]:
    """The same items, made `depth` ahead in another thread."""
    with ThreadPoolExecutor(1) as maker:
        made: deque[Future[Item | object]] = deque(maker.submit(next, items, _END) for _ in range(depth))
        while (item := made.popleft().result()) is not _END:
            made.append(maker.submit(next, items, _END))
            yield item  # type: ignore[misc]
