"""The images of `python -m pipeline.predict`: files, or samples of shards, in pieces that are predicted and committed one by one.

A piece's digest names its images as they are now (size and time of a file, index of a shard). So a continued command knows which pieces
are done, whatever was added, removed or replaced meanwhile.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, Protocol

from data import storage
from data.errors import DataError
from data.packing.folders import NOT_AN_IMAGE, LeftOut, scan
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.samples import MAX_IMAGE_BYTES, image_extension, printable
from data.shards.split import Shard, open_split
from data.storage.redact import redacted

PIECE = 2048
"""Images of a piece: a kill costs at most so many, and a million images are 500 files until all are done."""
_READERS = 8  # threads that read local files: a disk or a network share answers several requests at once

_TOO_LARGE = f"more than {MAX_IMAGE_BYTES:,} bytes"

Reasons = MutableMapping[str, str]  # path → why it cannot be read


class OpenPiece(NamedTuple):
    """A piece whose images can be read.

    Attributes:
        read: places → encoded images.
        places: of all images of the piece.
        problems: why an image is not to be decoded; empty texts for all others.
    """

    read: Callable[[Sequence[Place]], list[bytes]]
    places: Sequence[Place]
    problems: list[str]


class Piece(Protocol):
    """Images that are predicted and committed together."""

    def __len__(self) -> int:
        """Number of images."""

    def digest(self) -> str:
        """Equal for equal images: hex."""

    def open(self, unreadable: Reasons) -> AbstractContextManager[OpenPiece]:
        """Open the piece. Reasons for files that cannot be read are added to `unreadable`, by path."""


@dataclass(frozen=True)
class ImageFile:
    """A file with one image.

    Attributes:
        version: as in `storage.FileInfo`.
    """

    url: str
    size: int
    version: str

    @property
    def path(self) -> str:
        """The path or URL as it can be printed."""
        return printable(redacted(self.url))


@dataclass(frozen=True)
class FilePiece:
    """Loose files; see `Piece`."""

    files: tuple[ImageFile, ...]

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """See `Piece`."""
        return _digest(f"{file.path}\t{file.size}\t{file.version}" for file in self.files)

    @contextmanager
    def open(self, unreadable: Reasons) -> Iterator[OpenPiece]:
        """See `Piece`."""
        problems = [_TOO_LARGE if file.size > MAX_IMAGE_BYTES else "" for file in self.files]
        sizes = [0 if problem else file.size for file, problem in zip(self.files, problems, strict=True)]
        places = [Place(n, file.path, 0, size) for n, (file, size) in enumerate(zip(self.files, sizes, strict=True))]
        remote = not storage.is_local(self.files[0].url)
        with ThreadPoolExecutor(storage.PARALLEL_REQUESTS if remote else _READERS) as pool:
            yield OpenPiece(lambda wanted: list(pool.map(partial(self._read, unreadable), wanted)), places, problems)

    def _read(self, unreadable: Reasons, place: Place) -> bytes:
        """A file's bytes; none of a file that is too large or cannot be read. An object store that does not answer raises."""
        file = self.files[place.ordinal]
        if file.size > MAX_IMAGE_BYTES:
            return b""
        try:
            return storage.read_bytes(file.url)
        except (OSError, storage.MissingError) as error:
            unreadable[place.key] = getattr(error, "strerror", None) or str(error)
            return b""


@dataclass(frozen=True)
class ShardPiece:
    """Consecutive samples of a shard; see `Piece`."""

    shard: Shard
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def digest(self) -> str:
        """See `Piece`."""
        return _digest([f"{redacted(self.shard.url)}\t{self.shard.index_sha256}\t{self.start}\t{self.stop}"])

    @contextmanager
    def open(self, unreadable: Reasons) -> Iterator[OpenPiece]:  # noqa: ARG002 (a shard that cannot be read is an error)
        """See `Piece`."""
        part = self.shard.index().slice(self.start, len(self))
        home = printable(redacted(self.shard.url))
        with ImageReader([self.shard.url]) as reader:
            places = places_in(part, self.start)
            named = [place._replace(ordinal=number) for number, place in enumerate(places)]
            read = partial(_read_samples, reader, places)
            problems = part.column("problem").to_pylist()
            yield OpenPiece(read, [place._replace(key=f"{home}/{place.key}") for place in named], problems)


def _read_samples(reader: ImageReader, places: Sequence[Place], wanted: Sequence[Place]) -> list[bytes]:
    return reader.images(0, [places[place.ordinal] for place in wanted])


def _digest(lines: Iterator[str] | Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Images:
    """What `images=…` names.

    Attributes:
        passed_over: other files of a folder or pattern: reason → number.
    """

    pieces: tuple[Piece, ...]
    passed_over: Counter[str]

    @property
    def number(self) -> int:
        """Number of images."""
        return sum(map(len, self.pieces))


def find_images(images: str, index_folder: str) -> Images:
    """Find the images of a folder, a pattern of files, or shards.

    Args:
        index_folder: for the indexes of shards that data.pack did not write.

    Raises:
        DataError: there is no image, or shards and other files are mixed.
        StorageError, FileNotFoundError: nothing is there.
    """
    if storage.is_local(images) and storage.local_path(images).is_dir():
        return _in_folder(images)
    is_folder = not storage.is_local(images) and "." not in storage.base_name(images)
    urls = storage.expand(storage.join(images, "**") if is_folder else images)
    shards = [url for url in urls if url.endswith(".tar")]
    if shards and len(shards) < len(urls):
        raise DataError(f"images={redacted(images)}: .tar shards and other files; expected one of the two kinds")
    if shards:
        corpus = open_split(urls, index_folder).shards
        ranges = [(shard, start) for shard in corpus for start in range(0, shard.num_samples, PIECE)]
        pieces = [ShardPiece(shard, start, min(start + PIECE, shard.num_samples)) for shard, start in ranges]
        return Images(tuple(pieces), Counter())
    files = [_described(url) for url in urls if url == images or _is_named_as_image(url)]
    left_out = len(urls) - len(files)
    return _as_pieces(images, files, Counter({NOT_AN_IMAGE: left_out} if left_out else {}))


def _is_named_as_image(url: str) -> bool:
    """By the extension; the query of a remote URL does not count."""
    return bool(image_extension(url if storage.is_local(url) else url.partition("?")[0]))


def _in_folder(images: str) -> Images:
    """The images below a local folder, by the rules of data.pack."""
    files, passed_over = [], Counter[str]()
    for found in scan(storage.local_path(images)):
        if isinstance(found, LeftOut):
            passed_over[found.reason] += 1
        else:
            files.append(ImageFile(storage.join(images, found.name), found.size, str(found.modified)))
    return _as_pieces(images, files, passed_over)


def _as_pieces(images: str, files: Sequence[ImageFile], passed_over: Counter[str]) -> Images:
    if not files:
        shards = storage.join(images, "*.tar")
        raise DataError(
            f"images={redacted(images)}: no image there (.jpg, .jpeg, .png, .webp); of shards, name the files: images='{shards}'"
        )
    pieces = [FilePiece(tuple(files[start : start + PIECE])) for start in range(0, len(files), PIECE)]
    return Images(tuple(pieces), passed_over)


def _described(url: str) -> ImageFile:
    """The file with size and version: from its folder's listing, or asked for alone on a web server, which has none."""
    found = _listing(storage.parent(url)).get(storage.base_name(url)) or storage.file_info(url)
    return ImageFile(url, found.size, found.version)


@cache
def _listing(folder: str) -> dict[str, storage.FileInfo]:
    try:
        return storage.list_files(folder)
    except storage.StorageError:
        return {}
