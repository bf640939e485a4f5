"""Pseudo-labels in archives with images: the shards of an export, or those that a server joins while sending."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, ValidationError

from ... import storage
from ...base_names import check_base_name, read_limited
from ...errors import DataError
from ...json_files import first_problem
from ...shards.split import MANIFEST_NAME, Manifest, ShardRecord
from ...storage.http import is_http
from ...storage.redact import redacted
from ...storage.web_tokens import give_token
from ...tables import parse_table
from ..overlay import RowFilter
from . import COLUMNS, PseudoLabeled
from .archive_members import ArchivedSample, archived_samples

LATEST_NAME = "latest"  # file with the name of the last export in a folder of exports
LABELS_FOLDER = "labels"
_BLOCK = 1 << 18
_MANIFEST_BYTES, _TABLE_BYTES = (
    1 << 28,
    1 << 30,
)  # limits; a manifest of 13,000 shards has some MB, a table of 10,000 labels one
_COLUMN_TYPES = {"label": pa.types.is_integer, "confidence": pa.types.is_floating, "copies": pa.types.is_integer}
_MAX_CLASSES, _MAX_COPIES = 1 << 31, 0xFFFF  # int32, uint16
_MAX_CONFIDENCE = 1.001  # rounding of float32 sums


@dataclass(frozen=True)
class Archive:
    """A shard and its labels.

    Attributes:
        sha256: of the shard, in hex; None when a server makes it while sending.
    """

    url: str
    labels_url: str
    num_samples: int
    sha256: str | None


@dataclass(frozen=True)
class Archives:
    """A source of pseudo-labels; see `data.labels.sources.Source`.

    Attributes:
        keep: the samples to hand out.
        token: of the server.
    """

    archives: tuple[Archive, ...]
    class_names: tuple[str, ...] | None
    keep: RowFilter
    token: str | None = field(default=None, repr=False)

    @property
    def num_shards(self) -> int:
        """Number of archives."""
        return len(self.archives)

    def table(self, shard: int) -> pa.Table:
        """Labels from the Parquet file that belongs to the archive. Raises DataError when it has another form."""
        self._identify()
        archive = self.archives[shard]
        table = _read_table(archive.labels_url, archive.num_samples, self._num_classes())
        mask = self.keep.matches(*(table.column(name).to_numpy() for name in _COLUMN_TYPES))
        return table.filter(pa.array(mask))

    def _num_classes(self) -> int:
        return len(self.class_names) if self.class_names else _MAX_CLASSES

    def _identify(self) -> None:
        """Give the token to this process, which may be a loader's worker."""
        if self.token is not None:
            give_token(self.archives[0].url, self.token)

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """Read the archive from start to end. Raises DataError at the end when its bytes are not those that were exported."""
        archive, count, num_classes = self.archives[shard], 0, self._num_classes()
        self._identify()
        with storage.open_read(archive.url) as raw:
            file = _Hashing(raw)
            for found in archived_samples(cast(BinaryIO, file), archive.url):
                count += 1
                sample = _labeled(found, num_classes, archive.url)
                if self.keep.matches(sample.label, sample.confidence, sample.copies):
                    yield sample
            if archive.sha256 not in (None, file.sha256()):
                raise DataError(f"{redacted(archive.url)}: damaged: another SHA-256 than the export's; copy it again")
        if count != archive.num_samples:
            raise DataError(
                f"{redacted(archive.url)}: {count} samples, and {archive.num_samples} by the manifest; copy it again, or, of a "
                "server, open it again"
            )


class _JsonFields(BaseModel, strict=True):
    """The fields of a sample's `.json` that are read."""

    label: int = Field(ge=0)
    confidence: float = Field(ge=0, le=_MAX_CONFIDENCE)
    copies: int = Field(ge=0, le=_MAX_COPIES)


class _Hashing(io.RawIOBase):
    """A seekable file that hashes every byte that it passes while going forward."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._size = file.seek(0, io.SEEK_END)
        self._position, self._hashed = 0, file.seek(0)

    def tell(self) -> int:
        """The position, in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position counted from the file's start or end; read nothing."""
        self._position = offset + (self._size if whence == io.SEEK_END else 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes at the position."""
        if self._position < self._hashed:  # back, to explain an error
            self._file.seek(self._position)
            content = self._file.read(size)
            self._file.seek(self._hashed)
        else:
            while self._hashed < self._position and self._next(min(_BLOCK, self._position - self._hashed)):
                pass
            content = self._next(size)
        self._position += len(content)
        return content

    def _next(self, size: int) -> bytes:
        content = self._file.read(size)
        self._digest.update(content)
        self._hashed += len(content)
        return content

    def sha256(self) -> str:
        """SHA-256 of the whole file, in hex; reads the rest of it."""
        while self._next(_BLOCK):
            pass
        return self._digest.hexdigest()


def _labeled(sample: ArchivedSample, num_classes: int, url: str) -> PseudoLabeled:
    try:
        fields = _JsonFields.model_validate_json(sample.json)
    except ValidationError as error:
        raise DataError(
            f"{redacted(url)}, key {sample.key!r}: damaged .json ({first_problem(error)}); fetch the shard again"
        ) from None
    _check_label(fields.label, num_classes, f"{redacted(url)}, key {sample.key!r}")
    return PseudoLabeled(sample.key, sample.image, fields.label, float(np.float32(fields.confidence)), fields.copies)


def _check_label(label: int, num_classes: int, where: str) -> None:
    if label >= num_classes:
        raise DataError(f"{where}: label {label}, but there are {num_classes} classes; fetch shard and manifest again")


def open_exported(folder: str, keep: RowFilter) -> Archives:
    """Open an export with images. Raises DataError when the export has no images, or its manifest has another form."""
    url = storage.join(folder, MANIFEST_NAME)
    return exported(folder, url, read_manifest_bytes(url), keep)


def read_manifest_bytes(url: str) -> bytes:
    """Content of a manifest. Raises DataError when it is far too large; else as `storage.open_read`."""
    return read_limited(url, _MANIFEST_BYTES)


def exported(folder: str, url: str, content: bytes, keep: RowFilter) -> Archives:
    """The export in `folder` whose manifest at `url` has this content. Raises as `open_exported`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{redacted(url)}: damaged, or not the manifest of an export ({first_problem(error)}); copy it again"
        ) from error
    if without_images := [record.name for record in manifest.shards if not record.name.endswith(".tar")]:
        raise DataError(
            f"{redacted(url)}: labels alone ({without_images[0]}); expected an export with export.format=shards"
        )
    for record in manifest.shards:
        check_base_name(record.name, url)
    archives = tuple(_archive(folder, record) for record in manifest.shards)
    return Archives(archives, tuple(manifest.class_names) if manifest.class_names else None, keep)


def _archive(folder: str, record: ShardRecord) -> Archive:
    name = quote(record.name) if is_http(folder) else record.name
    labels_url = storage.join(folder, LABELS_FOLDER, name.removesuffix(".tar") + ".parquet")
    return Archive(storage.join(folder, name), labels_url, record.num_samples, record.sha256)


def _read_table(url: str, num_samples: int, num_classes: int) -> pa.Table:
    content = read_limited(url, _TABLE_BYTES)
    table = parse_table(content, url, "if it is of this pipeline, copy it again", COLUMNS)
    for name, is_right in _COLUMN_TYPES.items():
        column = table.column(name)
        if not is_right(column.type) or column.null_count:
            raise DataError(
                f"{redacted(url)}: column {name}: {column.type}; expected labels as stage=export writes them"
            )
    if table.num_rows != num_samples:
        raise DataError(
            f"{redacted(url)}: {table.num_rows} labels, and {num_samples} samples by the manifest; copy it again, or, of a "
            "server, open it again"
        )
    if num_samples:
        _check_label(pc.max(table.column("label")).as_py(), num_classes, redacted(url))
    return table
