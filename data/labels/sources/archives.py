"""Pseudo-labels in archives that have the images too: those of an export, or those that a server joins while it sends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, ValidationError

from data import storage
from data.json_files import first_problem
from data.labels.overlay import RowFilter
from data.labels.source import COLUMNS, PseudoLabeled
from data.labels.sources.archive_members import ArchivedSample, archived_samples
from data.names import check_base_name, read_limited
from data.shards.split import MANIFEST_NAME, DataError, Manifest, ShardRecord
from data.storage.http import is_http
from data.storage.redact import redacted
from data.storage.web_tokens import give_token
from data.tables import parse_table

LATEST_NAME = "latest"  # names the last export in a folder of them
LABELS_FOLDER = "labels"
_BLOCK = 1 << 18
_MANIFEST_BYTES, _TABLE_BYTES = (
    1 << 28,
    1 << 30,
)  # that are expected at most: 13,000 shards have some MB, 10,000 labels one
_COLUMN_TYPES = {"label": pa.types.is_integer, "confidence": pa.types.is_floating, "copies": pa.types.is_integer}
_MOST_CLASSES, _MOST_COPIES, _MOST_CONFIDENCE = (
    1 << 31,
    0xFFFF,
    1.001,
)  # int32, uint16; float32 sums are off by a little


@dataclass(frozen=True)
class Archive:
    """A shard and its labels.

    Attributes:
        sha256: of the shard, in hex; None where it is made while it is sent.
    """

    url: str
    labels_url: str
    num_samples: int
    sha256: str | None


@dataclass(frozen=True)
class Archives:
    """A source of pseudo-labels.

    Attributes:
        keep: which samples of the archives.
        token: of the server that has them.
    """

    archives: tuple[Archive, ...]
    class_names: tuple[str, ...] | None
    keep: RowFilter
    token: str | None = field(default=None, repr=False)

    @property
    def num_shards(self) -> int:
        """Archives."""
        return len(self.archives)

    def table(self, shard: int) -> pa.Table:
        """Labels alone, of the Parquet file beside the archive. Raises DataError when that is none of this pipeline."""
        self._identify()
        archive = self.archives[shard]
        table = _read_table(archive.labels_url, archive.num_samples, self._num_classes())
        mask = self.keep.matches(*(table.column(name).to_numpy() for name in _COLUMN_TYPES))
        return table.filter(pa.array(mask))

    def _num_classes(self) -> int:
        return len(self.class_names) if self.class_names else _MOST_CLASSES

    def _identify(self) -> None:
        """In a loader's worker, too, which may be a process that was told nothing."""
        if self.token is not None:
            give_token(self.archives[0].url, self.token)

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """Read from end to end. Raises DataError at the end, when the bytes were not those that were exported."""
        archive, count, num_classes = self.archives[shard], 0, self._num_classes()
        self._identify()
        with storage.open_read(archive.url) as raw:
            file = _Hashing(raw)
            for found in archived_samples(file, archive.url):
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


class _Said(BaseModel, strict=True):
    """What is read of a sample's `.json`."""

    label: int = Field(ge=0)
    confidence: float = Field(ge=0, le=_MOST_CONFIDENCE)
    copies: int = Field(ge=0, le=_MOST_COPIES)


class _Hashing:
    """A file that is read once, from start to end, with its digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self._digest.update(content)
        return content

    def sha256(self) -> str:
        """Of the whole file, what was not read yet included; in hex."""
        while self.read(_BLOCK):
            pass
        return self._digest.hexdigest()


def _labeled(sample: ArchivedSample, num_classes: int, url: str) -> PseudoLabeled:
    try:
        said = _Said.model_validate_json(sample.json)
    except ValidationError as error:
        raise DataError(
            f"{redacted(url)}, key {sample.key!r}: damaged .json ({first_problem(error)}); fetch the shard again"
        ) from None
    _check_label(said.label, num_classes, f"{redacted(url)}, key {sample.key!r}")
    return PseudoLabeled(sample.key, sample.image, said.label, float(np.float32(said.confidence)), said.copies)


def _check_label(label: int, num_classes: int, where: str) -> None:
    if label >= num_classes:
        raise DataError(f"{where}: label {label}, but there are {num_classes} classes; fetch shard and manifest again")


def open_exported(folder: str, keep: RowFilter) -> Archives:
    """An export with images.

    Raises:
        DataError: labels alone, or a manifest of something else.
    """
    url = storage.join(folder, MANIFEST_NAME)
    return exported(folder, url, read_manifest_bytes(url), keep)


def read_manifest_bytes(url: str) -> bytes:
    """Content of a manifest. Raises DataError for one that is far too large; as `storage.open_read`."""
    return read_limited(url, _MANIFEST_BYTES)


def exported(folder: str, url: str, content: bytes, keep: RowFilter) -> Archives:
    """The export in a folder with this manifest, read at `url`. Raises as `open_exported`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{redacted(url)}: damaged, or not the manifest of an export ({first_problem(error)}); copy it again"
        ) from error
    if alone := [record.name for record in manifest.shards if not record.name.endswith(".tar")]:
        raise DataError(f"{redacted(url)}: labels alone ({alone[0]}); expected an export with export.format=shards")
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
