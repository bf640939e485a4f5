"""Read a shard as batches for the model: read in long pieces, decoded in threads, ahead of the model.

A batch is a run of consecutive samples of one shard, so its content depends on the shard and the batch size alone. `ImageBudget` bounds
the bytes of files, of images being decoded, and of batches, so that neither large files nor many threads take more memory.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, tee
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa

from data.images.decode import DecodeError, Pixels
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.split import Shard
from teacher.labeling.image_budget import ImageBudget

Item = TypeVar("Item")
Allocate = Callable[[tuple[int, ...]], np.ndarray]
ReadFiles = Callable[[Sequence[Place]], list[bytes]]
_CHUNK = 32  # images per task of a decoding thread: large enough to schedule cheaply, small enough to end together
_READING = 3  # times the files' bytes while a piece is read: up to twice as much is read in one go, and cut into files
_AHEAD = 2  # batches that are read and decoded while the model works on another
_END = object()


class View(Protocol):
    """A clean view of encoded images, or of videos."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view of one sample."""

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        """The view, uint8 of `shape`, and a 64-bit perceptual hash. Raises DecodeError."""

    def decoding_bytes(self, content: bytes) -> int:
        """Bytes that making the view takes at its peak."""


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
        shape: of a batch of the maximum number of images: (n, image_size, image_size, 3), of clips (n, frames, …).
        num_batches: maximum number of batches at once.
        allocate: makes uint8 memory of a shape.
    """

    def __init__(self, shape: tuple[int, ...], num_batches: int, allocate: Allocate) -> None:
        self._shape, self._allocate = shape, allocate
        self._free: list[np.ndarray] = []
        self._room = threading.Semaphore(num_batches)

    @property
    def peak_bytes(self) -> int:
        """Bytes of all memory when none is taken: as much as was ever taken at once."""
        return sum(images.nbytes for images in self._free)

    def take(self, number: int) -> np.ndarray:
        """Take memory for `number` images, uninitialized: uint8 [number, …]. Waits while all is taken."""
        self._room.acquire()
        try:
            whole = self._free.pop()
        except IndexError:
            whole = self._allocate(self._shape)
        return whole[:number]

    def give_back(self, images: np.ndarray) -> None:
        """Return memory that `take` gave; nobody may read it afterwards."""
        assert images.base is not None
        self._free.append(images.base)
        self._room.release()


@dataclass
class ImageBatch:
    """Consecutive samples of a shard, each decoded or with a reason why it is not.

    Attributes:
        start: ordinal of the first sample.
        images: uint8 [n, *view.shape]; uninitialized where an image has a problem.
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

    def decoded(self) -> np.ndarray:
        """The decoded images alone, uint8 [m, …], moved to the front; call once, after `wait`."""
        good = self.is_good
        if good.all():
            return self.images
        number = int(good.sum())
        self.images[:number] = self.images[good]
        return self.images[:number]

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
        memory_bytes: for the files and images of all shards at once; see `ImageBudget`.
        allocate: makes memory for batches.
    """

    def __init__(
        self,
        view: View,
        batch_size: int,
        decode_threads: int,
        initializer: Callable[[], object],
        memory_bytes: int,
        allocate: Allocate,
    ) -> None:
        self.meter, self._view, self._batch_size = Meter(), view, batch_size
        self.budget = ImageBudget.of(memory_bytes, batch_size * math.prod(view.shape))
        self._memory = ImageMemory((batch_size, *view.shape), self.budget.num_batches, allocate)
        self._pool = ThreadPoolExecutor(decode_threads, initializer=initializer)
        self._read_lock = threading.Lock()

    def batches(self, shard: Shard, index: pa.Table) -> Generator[ImageBatch, None, None]:
        """Read the shard's batches, in order; each is read completely while its images are still being decoded.

        One shard is read at a time: the next begins while the last batches of this one go through the model. Files of a remote shard
        are asked for before their turn, those of later batches too.

        Args:
            index: the shard's index.

        Raises:
            DataError: the shard is shorter than its index says, or another one.
        """
        parts = [(start, index.slice(start, self._batch_size)) for start in range(0, index.num_rows, self._batch_size)]
        asked, taken = tee(places_in(part, start) for start, part in parts)
        pieces = (batch[rows.start : rows.stop] for batch in asked for rows in _pieces(batch, self.budget.piece_bytes))
        with (
            self._read_lock,
            ImageReader([shard.url]) as reader,
            closing(reader.read_ahead(pieces, lambda place: (0, place), self.budget.ahead_bytes)) as files,
        ):
            for (_, part), places in zip(parts, taken, strict=True):
                yield self.read(partial(_next_of, files), places, part.column("problem").to_pylist())

    @property
    def peak_bytes(self) -> int:
        """Maximum bytes of files, of images being decoded, and of batches, added; call when no shard is being read."""
        budget = self.budget
        return budget.files.peak + budget.ahead_bytes + budget.decoding.peak + self._memory.peak_bytes

    def release(self, batch: ImageBatch) -> None:
        """Take the memory of a decoded batch back, once; nobody may read its images afterwards."""
        self._memory.give_back(batch.images)

    def drop(self, batch: ImageBatch) -> None:
        """Release a batch that nobody will use, once it is decoded."""
        wait(batch.pending)
        self.release(batch)

    def read(self, read: ReadFiles, places: Sequence[Place], problems: list[str]) -> ImageBatch:
        """Read a batch in pieces, and have each decoded.

        Args:
            read: places of consecutive samples → their files.
            places: of at most `batch_size` samples.
            problems: a reason for each sample that is not to be decoded, else an empty text; further ones are added.
        """
        number = len(places)
        batch = ImageBatch(places[0].ordinal, self._memory.take(number), np.zeros(number, np.uint64), problems)
        try:
            for rows in _pieces(places, self.budget.piece_bytes):
                contents = self._read_piece(read, places[rows.start : rows.stop])
                for first in range(0, len(rows), _CHUNK):
                    chunk = rows[first : first + _CHUNK]
                    files = deque(contents[first : first + _CHUNK])
                    batch.pending.append(self._pool.submit(self._decode, batch, chunk, files))
                del contents, files  # each file is freed as soon as it is decoded
        except BaseException:
            self.drop(batch)
            raise
        return batch

    def _read_piece(self, read: ReadFiles, places: Sequence[Place]) -> list[bytes]:
        """Read files; their bytes stay in the budget until each is decoded."""
        wanted = sum(place.size for place in places)
        files = self.budget.files
        files.take(_READING * wanted)
        try:
            with self.meter.timing("read"):
                contents = read(places)
        except BaseException:
            files.give_back(_READING * wanted)
            raise
        files.give_back(
            _READING * wanted - sum(map(len, contents))
        )  # loose files may have changed since they were listed
        return contents

    def _decode(self, batch: ImageBatch, rows: range, files: deque[bytes]) -> None:
        """Decode files, removing each from the deque."""
        try:
            with self.meter.timing("decode"):
                for row in rows:
                    self._decode_one(batch, row, files.popleft())
        finally:  # after a bug's error some are left, and nobody may wait for their bytes
            self.budget.files.give_back(sum(map(len, files)))

    def _decode_one(self, batch: ImageBatch, row: int, content: bytes) -> None:
        try:
            if batch.problems[row]:
                return
            with self.budget.decoding.holding(self._view.decoding_bytes(content)):
                batch.images[row], batch.hashes[row] = self._view.with_hash(content)
        except DecodeError as error:
            batch.problems[row] = str(error)
        finally:
            self.budget.files.give_back(len(content))


def _next_of(files: Iterator[tuple[Place, bytes]], places: Sequence[Place]) -> list[bytes]:
    """The next files of an iterator over all of a shard's, which are those of `places`."""
    return [content for _, content in islice(files, len(places))]


def _pieces(places: Sequence[Place], max_bytes: int) -> Iterator[range]:
    """Rows of places in order, in runs whose files have at most `max_bytes` together, or are a single one."""
    first = total = 0
    for row, place in enumerate(places):
        if row > first and total + place.size > max_bytes:
            yield range(first, row)
            first, total = row, 0
        total += place.size
    yield range(first, len(places))


def with_problems(index: pa.Table, problems: Mapping[int, str]) -> pa.Table:
    """The index with further problems in its column `problem`, by ordinal: `BatchReader` does not decode these samples."""
    if not problems:
        return index
    column = index.column("problem").to_pylist()
    for ordinal, problem in problems.items():
        column[ordinal] = column[ordinal] or problem
    position = index.column_names.index("problem")
    return index.set_column(position, index.field(position), pa.array(column, index.field(position).type))


def ahead(
    items: Generator[Item, None, None], drop: Callable[[Item], object], depth: int = _AHEAD
) -> Generator[Item, None, None]:
    """Yield the same items; make up to `depth` ahead in another thread. Closes `items` at the end.

    Args:
        drop: called with items that are made, but not yielded because the caller stopped.
    """
    with closing(items), ThreadPoolExecutor(1) as maker:
        made: deque[Future[Item | object]] = deque(maker.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := made.popleft().result()) is not _END:
                made.append(maker.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            for future in made:
                _drop(future, drop)


def _drop(future: Future[Item | object], drop: Callable[[Item], object]) -> None:
    """Cancel the making of an item; drop the item if it is made, or being made. Its error is of no interest any more."""
    if future.cancel():
        return
    with suppress(Exception):
        if (item := future.result()) is not _END:
            drop(item)  # type: ignore[arg-type]
