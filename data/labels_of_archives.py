"""Pseudo-labels in archives that have the images too: those of an export, or those that a server joins while it sends."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from data import storage
from data.joined import JSON_FIELD
from data.label_source import COLUMNS, PseudoLabeled
from data.manifest import MANIFEST_NAME, DataError, Manifest
from data.overlay import FILTER_COLUMNS, RowFilter
from data.redact import redacted
from data.sample import IMAGE_EXTENSIONS, split_member_name
from data.tables import read_table

LATEST_NAME = "latest"  # names the last export in a folder of them
LABELS_FOLDER = "labels"
_BLOCK = 1 << 18


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
    """

    archives: tuple[Archive, ...]
    class_names: tuple[str, ...] | None
    keep: RowFilter

    @property
    def num_shards(self) -> int:
        """Archives."""
        return len(self.archives)

    def table(self, shard: int) -> pa.Table:
        """Labels alone, of the Parquet file beside the archive. Raises DataError when that is none of this pipeline."""
        url = self.archives[shard].labels_url
        table = read_table(url, "if it is of this pipeline, copy it again", COLUMNS)
        mask = self.keep.mask(table.select(FILTER_COLUMNS), table.column("copies").to_numpy())
        return table.filter(pa.array(mask))

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """Read from end to end. Raises DataError at the end, when the bytes were not those that were exported."""
        archive, count = self.archives[shard], 0
        with storage.open_read(archive.url) as raw:
            file = _Hashing(raw)
            for key, members in _members(file, archive.url):
                count += 1
                sample = _sample(key, members, archive.url)
                if self.keep.lets_through(sample.label, sample.confidence, sample.copies):
                    yield sample
            if archive.sha256 not in (None, file.sha256()):
                raise DataError(f"{redacted(archive.url)}: damaged: another SHA-256 than the export's; copy it again")
        if count != archive.num_samples:
            raise DataError(
                f"{redacted(archive.url)}: {count} samples, and {archive.num_samples} by the manifest; copy it again, or, of a "
                "server, open it again"
            )


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


def _members(file: _Hashing, url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members (field → content) of the samples of a tar."""
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK) as tar:  # type: ignore[call-overload]  # it reads alone
            for key, group in groupby(tar, key=lambda member: split_member_name(member.name)[0]):
                yield key, {split_member_name(member.name)[1]: _content(tar, member) for member in group}
    except tarfile.TarError as error:
        raise DataError(f"{redacted(url)}: cut short or damaged ({error}); copy it again") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream else b""


def _sample(key: str, members: Mapping[str, bytes], url: str) -> PseudoLabeled:
    images = [content for field, content in members.items() if field in IMAGE_EXTENSIONS]
    if len(images) != 1 or JSON_FIELD not in members:
        raise DataError(f"{redacted(url)}, key {key!r}: expected an image and a .json, as stage=export writes them")
    try:
        said = json.loads(members[JSON_FIELD])
        return PseudoLabeled(key, images[0], said["label"], float(np.float32(said["confidence"])), said["copies"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{redacted(url)}, key {key!r}: damaged .json ({type(error).__name__}: {error}); fetch the shard again"
        ) from error


def open_exported(folder: str, keep: RowFilter) -> Archives:
    """An export with images.

    Raises:
        DataError: labels alone, or a manifest of something else.
    """
    url = storage.join(folder, MANIFEST_NAME)
    return exported(folder, url, storage.read_bytes(url), keep)


def exported(folder: str, url: str, content: bytes, keep: RowFilter) -> Archives:
    """The export in a folder with this manifest, read at `url`. Raises as `open_exported`."""
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise DataError(
            f"{redacted(url)}: damaged, or not the manifest of an export ({where}: {first['msg']}); copy it again"
        ) from error
    if alone := [record.name for record in manifest.shards if not record.name.endswith(".tar")]:
        raise DataError(f"{redacted(url)}: labels alone ({alone[0]}); expected an export with export.format=shards")
    archives = (
        Archive(storage.join(folder, r.name), _labels_url(folder, r.name), r.num_samples, r.sha256)
        for r in manifest.shards
    )
    return Archives(tuple(archives), tuple(manifest.class_names) if manifest.class_names else None, keep)


def _labels_url(folder: str, name: str) -> str:
    return storage.join(folder, LABELS_FOLDER, name.removesuffix(".tar") + ".parquet")
