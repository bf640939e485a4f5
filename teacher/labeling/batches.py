"""Read a shard as batches for the model: read in long pieces, decoded in threads, ahead of the model.

A batch is a run of consecutive samples of one shard, so its content depends on the shard and the batch size alone.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
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
_CHUNK = 32  # images per task of a decoding thread: large enough to schedule cheaply, small enough to end together
_AHEAD = 2  # batches that are read and decoded while the model works on another
_END = object()


class Meter:
    """Count images, and seconds in `read`, `decode`, `model` and `write`, summed over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._images = 0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the block's time to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[part] += time.perf_counter() - started

    def add_images(self, number: int) -> None:
        """Count finished images, quarantined ones included."""
        with self._lock:
            self._images += number

    def read(self) -> tuple[int, dict[str, float]]:
        """Images and seconds so far."""
        with self._lock:
            return self._images, dict(self._seconds)


class ImageMemory:
    """Reuse the memory of batches' images: fresh pages for each batch take a twentieth of all time.

    Args:
        batch_size: maximum number of images of a batch.
        image_size: side in pixels.
    """

    def __init__(self, batch_size: int, image_size: int) -> None:
        self._shape = (batch_size, image_size, image_size, 3)
        self._free: list[np.ndarray] = []

    def take(self, number: int) -> np.ndarray:
        """Take memory for `number` images, uninitialized: uint8 [number, image_size, image_size, 3]."""
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self._shape, np.uint8)
        return whole[:number]

    def give_back(self, images: np.ndarray) -> None:
        """Return memory that `take` gave; nobody may read it afterwards."""
        assert images.base is not None
        self._free.append(images.base)


@dataclass
class ImageBatch:
    """Consecutive samples of a shard, each decoded or with a reason why it is not.

    Attributes:
        start: ordinal of the first sample.
        images: uint8 [n, image_size, image_size, 3]; uninitialized where an image has a problem.
        hashes: perceptual hashes, uint64 [n].
        problems: reasons, one per sample; empty if the image is decoded.
        pending: decoding tasks.
    """

    start: int
    images: np.ndarray
    hashes: np.ndarray
    problems: list[str]
    pending: list[Future[None]] = field(default_factory=list)

    @property
    def is_good(self) -> np.ndarray:
        """Whether each image is decoded, bool [n]; call after `wait`."""
        return np.array([not problem for problem in self.problems])

    def wait(self) -> None:
        """Wait for the decoding tasks; raise what they raised, other than DecodeError."""
        for future in self.pending:
            future.result()


class BatchReader:
    """Read shards as batches and decode them in threads. Several shards may be read at once; they share threads and memory.

    Args:
        view: crop, resize and hash of an image.
        decode_threads: number of decoding threads.
        initializer: runs first in each decoding thread.
    """

    def __init__(
        self,
        view: EvalView,
        batch_size: int,
        decode_threads: int,
        initializer: Callable[[], object],
    ) -> None:
        self.meter, self._view, self._batch_size = Meter(), view, batch_size
        self._memory = ImageMemory(batch_size, view.image_size)
        self._pool = ThreadPoolExecutor(decode_threads, initializer=initializer)
        self._read_lock = threading.Lock()

    def batches(self, shard: Shard, index: pa.Table) -> Iterator[ImageBatch]:
        """Read the shard's batches, in order; each is read completely while its images are still being decoded.

        One shard is read at a time: the next begins while the last batches of this one go through the model.

        Args:
            index: the shard's index.

        Raises:
            DataError: the shard is shorter than its index says, or another one.
        """
        with self._read_lock, ImageReader([shard.url]) as reader:
            for start in range(0, index.num_rows, self._batch_size):
                yield self._read(reader, index.slice(start, self._batch_size), start)

    def release(self, batch: ImageBatch) -> None:
        """Take the batch's memory back and count its images."""
        self._memory.give_back(batch.images)
        self.meter.add_images(len(batch.problems))

    def _read(self, reader: ImageReader, part: pa.Table, start: int) -> ImageBatch:
        places, problems = places_in(part, start), part.column("problem").to_pylist()
        number = len(places)
        with self.meter.timing("read"):
            contents = reader.images(0, places)
        batch = ImageBatch(start, self._memory.take(number), np.zeros(number, np.uint64), problems)
        for first in range(0, number, _CHUNK):
            rows = range(first, min(first + _CHUNK, number))
            batch.pending.append(self._pool.submit(self._decode, batch, rows, contents))
        return batch

    def _decode(self, batch: ImageBatch, rows: range, contents: list[bytes]) -> None:
        with self.meter.timing("decode"):
            for row in rows:
                if batch.problems[row]:
                    continue
                try:
                    batch.images[row], batch.hashes[row] = self._view.with_hash(contents[row])
                except DecodeError as error:
                    batch.problems[row] = str(error)


def ahead(items: Iterator[Item], depth: int = _AHEAD) -> Iterator[Item]:
    """Yield the same items; make up to `depth` ahead in another thread."""
    with ThreadPoolExecutor(1) as maker:
        made: deque[Future[Item | object]] = deque(maker.submit(next, items, _END) for _ in range(depth))
        while (item := made.popleft().result()) is not _END:
            made.append(maker.submit(next, items, _END))
            yield item  # type: ignore[misc]
