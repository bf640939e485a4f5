"""The catalog a server serves: the base of its two kinds (`JoinedRun`, `ExportedVersion`), the files in it, and manifest.json."""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, ClassVar, Literal
from urllib.parse import quote

import numpy as np

from data import storage
from data.labels.overlay import RowFilter
from data.labels.sources.server import FORMAT
from data.shards.image_ranges import FileRange

FORMAT_VERSION = 1
Kind = Literal["joined", "export"]
Piece = Sequence[bytes | memoryview | FileRange]
SAMPLE_SHARDS, SAMPLES_PER_SHARD, MAXIMUM_SAMPLE_BYTES = 4, 6, 4 << 20  # images on the page
_PIECE_BYTES = 1 << 20


class OutdatedError(ValueError):
    """A file has changed or is gone since the server started; the message goes to the client."""


@dataclass(frozen=True)
class Content:
    """Bytes to send.

    Attributes:
        read: yield bytes `start` to `stop` in pieces, each as parts that are valid until the iterator is closed; blocks.
        open: open the content as a local file, for `sendfile`; blocks, raises OutdatedError. None if it is not one.
    """

    size: int
    read: Callable[[int, int], Iterator[Piece]]
    open: Callable[[], BinaryIO] | None = None


@dataclass(frozen=True)
class ServedFile:
    """A file of the catalog.

    Attributes:
        etag: quoted; equal tags mean equal bytes, after a restart too.
        check: raise OutdatedError if the files behind it have changed; blocks.
        load: prepare its content; blocks. The result is cached by `etag`.
    """

    etag: str
    media_type: str
    check: Callable[[], None]
    load: Callable[[], Content]


@dataclass(frozen=True)
class ShardEntry:
    """A shard in the manifest; `sha256` and `bytes` are known for exports only."""

    name: str
    num_samples: int
    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class SampleImage:
    """An image on the page, with its label. `where`: its key, for people; `read` blocks."""

    label: int
    confidence: float
    where: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Catalog(ABC):
    """What a server serves. `parse`, `shard` and `labels` do not block; the other methods do.

    Attributes:
        kind: as the manifest names it.
        title: of the page.
        generation: of the labels.
        class_names: in label order, if known.
        class_counts: per class, as in selection.json.
    """

    kind: ClassVar[Kind]
    title: str
    generation: int
    class_names: tuple[str, ...] | None
    class_counts: Sequence[Mapping[str, Any]]

    @property
    def files(self) -> Mapping[str, ServedFile]:
        """Files beside shards and labels, by name."""
        return {}

    @abstractmethod
    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """Parse the filter in a URL. Raises FilterError."""

    @abstractmethod
    def shard(self, name: str, row_filter: RowFilter) -> ServedFile | None:
        """Return a shard's tar by its name (without `.tar`), or None if there is none."""

    @abstractmethod
    def labels(self, name: str, row_filter: RowFilter) -> ServedFile | None:
        """Return a shard's labels as Parquet, or None if there is no such shard."""

    @abstractmethod
    def entries(self, row_filter: RowFilter) -> list[ShardEntry]:
        """List all shards, in order."""

    @abstractmethod
    def samples(self, row_filter: RowFilter) -> list[SampleImage]:
        """Choose a few images for the page, evenly spaced over a few shards."""


def manifest_of(catalog: Catalog, row_filter: RowFilter) -> dict[str, Any]:
    """Return the content of manifest.json; its URLs are relative to its own."""
    query, entries = row_filter.query(), catalog.entries(row_filter)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": catalog.kind,
        "generation": catalog.generation,
        "class_names": list(catalog.class_names) if catalog.class_names else None,
        "num_samples": sum(entry.num_samples for entry in entries),
        "shards": [_manifest_entry(entry, query) for entry in entries],
    }


def _manifest_entry(entry: ShardEntry, query: str) -> dict[str, Any]:
    name = quote(entry.name, safe="")
    urls = {"url": f"shards/{name}.tar{query}", "labels_url": f"labels/{name}.parquet{query}"}
    fields: dict[str, Any] = {"name": entry.name, **urls, "num_samples": entry.num_samples}
    return fields if entry.sha256 is None else fields | {"sha256": entry.sha256, "bytes": entry.bytes}


def spread(length: int, number: int) -> list[int]:
    """Return up to `number` positions of a list of `length`, evenly spaced from first to last."""
    return np.unique(np.linspace(0, max(length - 1, 0), number).astype(int))[:length].tolist()


def bytes_content(content: bytes) -> Content:
    """Wrap bytes in memory."""

    def read(start: int, stop: int) -> Iterator[Piece]:
        yield [memoryview(content)[start:stop]]

    return Content(len(content), read)


def file_content(url: str, size: int) -> Content:
    """Wrap a whole file of `size` bytes."""
    return Content(size, partial(_read_pieces, url), partial(open_file, url, size) if storage.is_local(url) else None)


def open_file(url: str, size: int | None = None) -> BinaryIO:
    """Open a local file for reading. Raises OutdatedError for a link, a pipe, a folder, or a size other than `size`."""
    name = storage.base_name(url)
    try:
        descriptor = os.open(storage.local_path(url), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    except OSError as error:
        raise OutdatedError(f"{name} cannot be opened ({error.strerror}); expected a file") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or size not in (None, found.st_size):
        os.close(descriptor)
        raise OutdatedError(f"{name} is not the file of {size} bytes that it was; restore it")
    return os.fdopen(descriptor, "rb")


def read_file(url: str) -> bytes:
    """Read a whole file. Raises OutdatedError as `open_file` if it is local."""
    if not storage.is_local(url):
        return storage.read_bytes(url)
    with open_file(url) as file:
        return file.read()


def is_regular(url: str) -> bool:
    """Return False for a local path that is missing or not a regular file (reading a pipe would block)."""
    try:
        return not storage.is_local(url) or stat.S_ISREG(storage.local_path(url).stat().st_mode)
    except OSError:
        return False


def _read_pieces(url: str, start: int, stop: int) -> Iterator[Piece]:
    with storage.open_read(url) as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(_PIECE_BYTES, stop - start))):
            yield [piece]
            start += len(piece)
