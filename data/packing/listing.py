"""The images below a folder, listed in files: memory does not grow with their number, and every process can read any of them.

`paths` has the paths below the folder one after the other; `numbers` has three int64 per image: where its path ends in `paths`, its
size in bytes, and its modification time in nanoseconds. About 100 bytes an image on disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, overload

import numpy as np
from numpy.typing import NDArray

from .folders import ImageFile

_ROW = struct.Struct("<3q")
_ROW_BYTES = _ROW.size
_ROWS_AT_ONCE = 100_000
_BUFFER = 2**20  # bytes


class Row(NamedTuple):
    """One listed image."""

    name: bytes  # path below the folder, as the file system has it
    size: int
    modified: int


class ListingWriter:
    """Write a listing; use as a context manager."""

    def __init__(self, folder: str) -> None:
        self._paths, self._numbers = (_create(folder, name) for name in ("paths", "numbers"))
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._paths.close()
        self._numbers.close()

    def add(self, row: Row) -> None:
        """Append an image."""
        self._end += len(row.name)
        self._paths.write(row.name)
        self._numbers.write(_ROW.pack(self._end, row.size, row.modified))


def _create(folder: str, name: str) -> BinaryIO:
    return (Path(folder) / name).open("wb", buffering=_BUFFER)


@dataclass(frozen=True)
class Listing(Sequence[ImageFile]):
    """The images of a finished listing, sorted by path. Picklable: it has names of files and opens them when it reads.

    Attributes:
        root: the folder that was scanned.
        folder: has the listing's files.
    """

    root: str
    folder: str

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, position: int) -> ImageFile: ...

    @overload
    def __getitem__(self, position: slice) -> list[ImageFile]: ...

    def __getitem__(self, position: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        row = self.row(position)
        return ImageFile(Path(self.root, os.fsdecode(row.name)), row.size)

    def row(self, position: int) -> Row:
        """One image, read by its position."""
        paths, numbers = self._files
        start = _ROW.unpack(os.pread(numbers, _ROW_BYTES, (position - 1) * _ROW_BYTES))[0] if position else 0
        end, size, modified = _ROW.unpack(os.pread(numbers, _ROW_BYTES, position * _ROW_BYTES))
        return Row(os.pread(paths, end - start, start), size, modified)

    def rows(self) -> Iterator[Row]:
        """All images in order; reads the files from front to end."""
        start = 0
        with Path(self.folder, "paths").open("rb") as paths, Path(self.folder, "numbers").open("rb") as numbers:
            while content := numbers.read(_ROWS_AT_ONCE * _ROW_BYTES):
                for end, size, modified in _ROW.iter_unpack(content):
                    yield Row(paths.read(end - start), size, modified)
                    start = end

    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image: int64 (N,)."""
        numbers = np.fromfile(Path(self.folder, "numbers"), np.int64).reshape(-1, 3)
        return np.ascontiguousarray(numbers[:, 1])

    @cached_property
    def _count(self) -> int:
        return Path(self.folder, "numbers").stat().st_size // _ROW_BYTES

    @cached_property
    def _files(self) -> tuple[int, int]:
        """Descriptors of `paths` and `numbers`, open as long as this object lives."""
        files = tuple(os.open(Path(self.folder, name), os.O_RDONLY) for name in ("paths", "numbers"))
        return files[0], files[1]

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root, "folder": self.folder}

    def __del__(self) -> None:
        for descriptor in self.__dict__.pop("_files", ()):
            os.close(descriptor)


@dataclass(frozen=True)
class Order:
    """Positions in a listing, in the order in which a split has them, in a file. Picklable."""

    path: str
    count: int
    kind: str  # the numbers' type in the file

    def __len__(self) -> int:
        return self.count

    def read(self, start: int = 0, end: int | None = None) -> list[int]:
        """Positions `start` to before `end`; by default all."""
        size = np.dtype(self.kind).itemsize
        count = (self.count if end is None else min(end, self.count)) - start
        return np.fromfile(self.path, self.kind, count, offset=start * size).tolist()


def write_order(path: str, positions: NDArray[np.integer[Any]]) -> Order:
    """Keep the order of a split in a file."""
    positions.tofile(path)
    return Order(path, len(positions), positions.dtype.str)


def shuffled(count: int, seed: int) -> NDArray[np.integer[Any]]:
    """`default_rng(seed).permutation(count)` in half the memory: 4 bytes a number."""
    numbers: NDArray[np.integer[Any]] = np.arange(count).astype(np.uint32 if count < 2**32 else np.int64)
    np.random.default_rng(seed).shuffle(numbers)
    return numbers
