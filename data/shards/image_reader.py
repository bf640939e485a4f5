"""Read images by their places in shards, and check that each belongs to the expected sample.

A place is from the shard's index, and the shard may have changed since. So the tar header in front of an image is read with it and must
name the sample.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from typing import BinaryIO, NamedTuple, TypeVar

import pyarrow as pa

from .. import storage
from ..errors import DataError
from ..storage.redact import redacted
from .read_ahead import Pending, read_ahead
from .samples import iterate_samples
from .split import Shard, Split
from .tar_header import MAX_FRONT, bytes_in_front, describe_front, is_in_front

PLACE_COLUMNS = ("ordinal", "__key__", "offset", "size")  # of label rows; see `places_of`
_OPEN_FILES = 64
_GAP = 4 << 10  # bytes between two images that are read in one piece: headers and labels
_REMOTE_GAP = 64 << 10  # the same in a remote shard: less than a photo
_MAX_READ = 1 << 30  # bytes of one local read; Linux returns at most 2 GiB

Item = TypeVar("Item")


class Place(NamedTuple):
    """Where an image is in its shard, by the index.

    Attributes:
        ordinal: of the sample in the shard, for messages.
        key: of the sample.
        offset, size: of the image's bytes in the tar, bytes.
    """

    ordinal: int
    key: str
    offset: int
    size: int

    @property
    def start(self) -> int:
        """The first byte to read, so that the image's tar header is included."""
        return max(0, self.offset - bytes_in_front(self.key))

    @property
    def end(self) -> int:
        """The byte after the image."""
        return self.offset + self.size


def places_of(labels: pa.Table) -> list[Place]:
    """Places of the images of label rows: columns `ordinal`, `__key__`, `offset` and `size`."""
    columns = (labels.column(name).to_pylist() for name in PLACE_COLUMNS)
    return list(map(Place, *columns))


def places_in(index: pa.Table, first: int = 0) -> list[Place]:
    """Places of all samples of an index, or of a slice of it that starts at sample `first`; size 0 for a sample with a problem."""
    columns = (index.column(name).to_pylist() for name in ("key", "offset", "size", "problem"))
    rows = enumerate(zip(*columns, strict=True), first)
    return [Place(ordinal, key, offset, 0 if problem else size) for ordinal, (key, offset, size, problem) in rows]


def read_image(url: str, place: Place) -> bytes:
    """Read one image of one shard. Raises as `ImageReader.image`."""
    with ImageReader([url]) as reader:
        return reader.image(0, place)


class ImageReader:
    """Read images from shards; keep recently used files open. Safe for threads and forked processes."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self._files = _OpenFiles(urls)

    def image(self, shard: int, place: Place) -> bytes:
        """The image at a place in the shard at position `shard`; empty, without reading, for a size of 0.

        Raises:
            DataError: the shard was cut short, or the bytes there belong to another sample than `place.key`; names the shard.
        """
        if not place.size:
            return b""
        piece = self.read(shard, place.start, place.end - place.start)
        return self._checked(shard, place, piece, place.start)

    def images(self, shard: int, places: Sequence[Place]) -> list[bytes]:
        """As `image`, for several places; reads neighbours in one piece, and pieces of a remote shard at once."""
        return [content for _, content in self.read_ahead([places], lambda place: (shard, place))]

    def read_ahead(
        self,
        chunks: Iterable[Sequence[Item]],
        where: Callable[[Item], tuple[int, Place]],
        max_bytes: int | None = None,
    ) -> Generator[tuple[Item, bytes], None, None]:
        """Each item of each chunk, in order, with its image. Remote images are read before their turn, many at once.

        Neighbours in a shard are looked for within a chunk. Close the generator if it is left early.

        Args:
            where: the shard's position and the place of an item's image.
            max_bytes: of remote images that are held before their turn; None: `read_ahead.MAX_AHEAD`.

        Raises:
            DataError: as `image`, at the item's turn.
        """
        for item, piece, start in read_ahead(self, chunks, where, max_bytes):
            shard, place = where(item)
            yield item, self._checked(shard, place, piece, start) if place.size else b""

    def gap(self, shard: int) -> int:
        """See `read_ahead.Source`. A request takes as long as 64 KiB at the speed that is left to one of 64 connections."""
        return _GAP if storage.is_local(self._urls[shard]) else _REMOTE_GAP

    def begin(self, shard: int, offset: int, size: int) -> Pending:
        """See `read_ahead.Source`. A local file is read when its bytes are needed."""
        future = None if storage.is_local(self._urls[shard]) else self._files.begin(shard, offset, size)
        return _Read(lambda: self.read(shard, offset, size), size, future)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, unchecked. Raises DataError, naming the shard, when it ends before."""
        content = self._files.read(shard, offset, size)
        if len(content) != size:
            raise DataError(f"{self._urls[shard]}: cut short before byte {offset + size}; restore the shard")
        return content

    def _checked(self, shard: int, place: Place, piece: bytes, start: int) -> bytes:
        """Cut the image out of a piece of the shard that begins at byte `start`, checking its tar header."""
        offset = place.offset - start
        if not is_in_front(piece[place.start - start : offset], place.key, place.size):
            first = max(0, place.offset - MAX_FRONT)
            front = self.read(shard, first, place.offset - first)
            if not is_in_front(front, place.key, place.size):
                raise DataError(
                    f"{redacted(self._urls[shard])}: sample {place.ordinal} should be {place.key!r}, with {place.size} bytes at byte "
                    f"{place.offset}, but there is {describe_front(front)}: the shard has changed since it was indexed. Restore it; or "
                    "make its index anew: stage=label verify=true for unlabeled shards, else the stage with force=true, and pack again "
                    "what data.pack wrote"
                )
        return piece[offset : offset + place.size]

    def close(self) -> None:
        """Close all files."""
        self._files.clear()

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"_urls": self._urls}  # open files cannot be pickled

    def __setstate__(self, state: dict[str, Sequence[str]]) -> None:
        self.__init__(state["_urls"])  # type: ignore[misc]


class _Read:
    """A piece that is being read, or will be when it is asked for."""

    def __init__(self, read: Callable[[], bytes], size: int, future: Future[bytes] | None) -> None:
        self._read, self._future, self.size = read, future, 0 if future is None else size

    def result(self) -> bytes:
        """The bytes. What could not be read ahead is read again, with retries: its error is the one to tell."""
        if self._future is not None:
            with suppress(Exception):
                return self._future.result()
        return self._read()

    def cancel(self) -> None:
        """Stop a request that nobody waits for."""
        if self._future is not None:
            self._future.cancel()


class _OpenFiles:
    """Recently used files of one process.

    A forked process opens its own: otherwise it would share its parent's positions and connections, and have locks in their state
    at the fork.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = urls
        self.clear()

    def clear(self) -> None:
        """Forget all files; each is closed when no thread reads it any more."""
        self._process, self._lock = os.getpid(), threading.Lock()
        self._files: OrderedDict[int, _LocalFile | _RemoteFile] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """At most `size` bytes; fewer at the end of the file."""
        return self._file(shard).read(offset, size)

    def begin(self, shard: int, offset: int, size: int) -> Future[bytes] | None:
        """Begin to read exactly `size` bytes of a remote file; None if it must be read when needed."""
        file = self._file(shard)
        return file.begin(offset, size) if isinstance(file, _RemoteFile) else None

    def _file(self, shard: int) -> _LocalFile | _RemoteFile:
        if self._process != os.getpid():
            self.clear()
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _open(self._urls[shard])
            self._files.move_to_end(shard)
            file = self._files[shard]
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file


def _open(url: str) -> _LocalFile | _RemoteFile:
    return _LocalFile(url) if storage.is_local(url) else _RemoteFile(url)


class _LocalFile:
    """Read with `pread`, without a position that threads and forked processes would share."""

    def __init__(self, url: str) -> None:
        self._descriptor = os.open(storage.local_path(url), os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end of the file."""
        pieces: list[bytes] = []
        while size and (piece := os.pread(self._descriptor, min(size, _MAX_READ), offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __del__(self) -> None:
        with suppress(AttributeError):  # opening it failed
            os.close(self._descriptor)


class _RemoteFile:
    """Read by one thread at a time, as the file reads ahead from its position; ranges that are begun need no opening."""

    def __init__(self, url: str) -> None:
        self._url, self._read_lock = url, threading.Lock()
        self._file: BinaryIO | None = None
        self._ranges = storage.open_ranges(url)

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end of the file."""
        with self._read_lock:
            if self._file is None:
                self._file = storage.open_read(self._url)
            self._file.seek(offset)
            return self._file.read(size)

    def begin(self, offset: int, size: int) -> Future[bytes] | None:
        """See `_OpenFiles.begin`."""
        return None if self._ranges is None or self._ranges.is_paused else self._ranges.begin(offset, size)


def check_labeled(split: Split, num_classes: int) -> None:
    """Check every sample of labeled shards.

    Raises:
        DataError: a sample has a problem, no label or a label out of range; or images are in no sample. Names the first.
    """
    for shard, table in zip(split.shards, split.indexes(), strict=True):
        columns = [table.column(name).to_pylist() for name in ("key", "label", "problem")]
        rows = [
            (f"{shard.url}, sample {n} (key {key!r})", *row) for n, (key, *row) in enumerate(zip(*columns, strict=True))
        ]
        for (
            where,
            _,
            problem,
        ) in rows:  # before labels: a missing label may be in another part of a sample whose members are not adjacent
            if problem:
                raise DataError(f"{where}: {problem}; repair or remove it")
        if shard.findings.stray:
            raise DataError(
                f"{shard.url}: {shard.findings.stray} images lie beside the image of a sample ({shard.findings.ignored_fields}) and "
                "would be lost, as the first dot of a name ends its key; rename the files, or pack their folder with data.pack"
            )
        for ordinal, (where, label, _) in enumerate(rows):
            if label is None:
                raise DataError(f"{where}: {_no_label(shard, ordinal)}; labeled shards need one in every sample")
            if not 0 <= label < num_classes:
                raise DataError(f"{where}: label {label} is out of range; expected 0 to {num_classes - 1}")


def _no_label(shard: Shard, ordinal: int) -> str:
    """Why a sample has no label. The index does not hold the reason, so read the shard again."""
    with storage.open_read(shard.url) as file:
        sample = next(islice(iterate_samples(file), ordinal, None), None)
    if sample is None or sample.label_text is None:
        return "no .cls member with a class index (0, 1, …)"
    return f".cls holds {sample.label_text!r}; expected a class index (0, 1, …)"
