"""Serve an exported version's files unchanged: shards, label tables and manifests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from data import storage
from data.base_names import check_base_name, is_base_name
from data.labels.overlay import RowFilter
from data.labels.sources.archives import LABELS_FOLDER
from data.shards.image_reader import Place, read_image
from data.shards.split import MANIFEST_NAME, ShardRecord
from data.tables import parse_table
from pipeline.core.stage import StageError, require_done
from pipeline.export.manifests import read_manifest
from pipeline.serving.catalog import (
    MAXIMUM_SAMPLE_BYTES,
    SAMPLE_SHARDS,
    SAMPLES_PER_SHARD,
    Catalog,
    OutdatedError,
    SampleImage,
    ServedFile,
    ShardEntry,
    bytes_content,
    file_content,
    read_file,
    spread,
)
from pipeline.serving.filters import FilterError

_MEDIA_TYPES = {"json": "application/json", "md": "text/markdown; charset=utf-8"}


@dataclass(frozen=True)
class ExportedVersion(Catalog):
    """Catalog of an export's files.

    Attributes:
        small_files: manifests and other small files, in memory, by name.
        tables: {"bytes", "sha256"} of each label table as committed, by path; empty for exports made before these were recorded.
        versions: of each file in the folder when the server started (modification time or ETag), by name; see `storage.FileInfo`.
    """

    kind = "export"
    folder: str
    shards: Sequence[ShardRecord]
    small_files: Mapping[str, ServedFile]
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def files(self) -> Mapping[str, ServedFile]:
        """Small files, and the shards under their own names, where timm and wids look for them."""
        return {**{record.name: self._tar(record) for record in self.shards}, **self.small_files}

    @cached_property
    def _records(self) -> Mapping[str, ShardRecord]:
        return {record.name.removesuffix(".tar"): record for record in self.shards}

    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """Return the filter that lets everything through. Raises FilterError for any parameter."""
        if query:
            raise FilterError(
                f"{query[0][0]}: an export is served without a filter; expected no parameters. "
                "A server with serve.source=run filters"
            )
        return RowFilter()

    def shard(self, name: str, row_filter: RowFilter) -> ServedFile | None:  # noqa: ARG002 (the catalog's interface)
        """Return a shard; its ETag is its SHA-256."""
        record = self._records.get(name)
        return self._tar(record) if record else None

    def labels(self, name: str, row_filter: RowFilter) -> ServedFile | None:  # noqa: ARG002 (the catalog's interface)
        """Return its label table; its ETag is its SHA-256, if recorded."""
        if (record := self._records.get(name)) is None:
            return None
        path = f"{LABELS_FOLDER}/{name}.parquet"
        committed = self.tables.get(path, {})
        check = partial(check_file, self.folder, storage.join(self.folder, path), committed.get("bytes"))
        etag = f'"{committed.get("sha256", f"{record.sha256}-labels")}"'
        return ServedFile(etag, "application/vnd.apache.parquet", check, lambda: bytes_content(self._table(path)))

    def _table(self, path: str) -> bytes:
        """Read a label table. Raises OutdatedError if it is not the committed one."""
        content = read_file(storage.join(self.folder, path))
        if self.tables.get(path, {}).get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise OutdatedError(f"{path} has changed since the export was made; run stage=export, or restore it")
        return content

    def _tar(self, record: ShardRecord) -> ServedFile:
        url = storage.join(self.folder, record.name)
        check = partial(check_file, self.folder, url, record.bytes, self.versions.get(record.name, ""))
        return ServedFile(f'"{record.sha256}"', "application/x-tar", check, partial(file_content, url, record.bytes))

    def entries(self, row_filter: RowFilter) -> list[ShardEntry]:  # noqa: ARG002 (the catalog's interface)
        """See `Catalog`."""
        return [ShardEntry(name, r.num_samples, r.sha256, r.bytes) for name, r in self._records.items()]

    def samples(self, row_filter: RowFilter) -> list[SampleImage]:  # noqa: ARG002 (the catalog's interface)
        """See `Catalog`."""
        names = list(self._records)
        return [sample for at in spread(len(names), SAMPLE_SHARDS) for sample in self._samples_of(names[at])]

    def _samples_of(self, name: str) -> Iterator[SampleImage]:
        labels, record = f"{LABELS_FOLDER}/{name}.parquet", self._records[name]
        columns = ["__key__", "offset", "size", "label", "confidence"]
        remedy = "delete it and run stage=export, which makes it again"
        table = parse_table(self._table(labels), storage.join(self.folder, labels), remedy, columns)
        ordinals = spread(table.num_rows, SAMPLES_PER_SHARD)
        for ordinal, row in zip(ordinals, table.take(ordinals).to_pylist(), strict=True):
            if 0 <= row["size"] <= MAXIMUM_SAMPLE_BYTES and row["offset"] >= 0:
                place = Place(ordinal, row["__key__"], row["offset"], row["size"])
                yield SampleImage(row["label"], row["confidence"], place.key, partial(self._image, record, place))

    def _image(self, record: ShardRecord, place: Place) -> bytes:
        url = storage.join(self.folder, record.name)
        self._tar(record).check()
        return read_image(url, place)


def open_version(folder: str, class_counts: Sequence[Mapping[str, Any]]) -> ExportedVersion:
    """Open an export; read its small files (not shards or label tables) into memory.

    Args:
        class_counts: per class, as in selection.json.

    Raises:
        StageError: the export is unfinished, or has labels without images.
        DataError: the manifest names a file outside of the folder.
        OutdatedError: a small file is missing, or a link to outside.
    """
    record = require_done(folder, "export")
    if (form := record["fingerprint"]["config"].get("export.format", "shards")) != "shards":
        raise StageError(
            f"{folder}: labels alone (export.format={form}); expected an export with images; make one, or set serve.source=run"
        )
    outputs, summary, manifest = record["outputs"], record["summary"], read_manifest(folder)
    for shard in manifest.shards:
        check_base_name(shard.name, storage.join(folder, MANIFEST_NAME))
    names = [name for name in outputs if name != MANIFEST_NAME and is_base_name(name)]
    small_files = {name: _small_file(folder, name) for name in names}
    tables = {name: facts for name, facts in outputs.items() if name.startswith(f"{LABELS_FOLDER}/")}
    title = f"export {storage.base_name(folder)}, generation {summary['generation']}"
    names_of_classes = tuple(manifest.class_names) if manifest.class_names else None
    versions = {name: file.version for name, file in storage.list_files(folder).items()}
    return ExportedVersion(
        title,
        summary["generation"],
        names_of_classes,
        class_counts,
        folder,
        manifest.shards,
        small_files,
        tables,
        versions,
    )


def _small_file(folder: str, name: str) -> ServedFile:
    url = storage.join(folder, name)
    check_file(folder, url, None)
    content = read_file(url)
    media_type = _MEDIA_TYPES.get(name.rpartition(".")[2], "text/plain; charset=utf-8")
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    return ServedFile(etag, media_type, _check_nothing, partial(bytes_content, content))


def _check_nothing() -> None:
    """A file in memory cannot change."""


def check_file(folder: str, url: str, num_bytes: int | None, version: str = "") -> None:
    """Raise OutdatedError if a file is missing, has another size or version, or is a link to outside of the folder.

    Args:
        num_bytes: its size; None: any.
        version: as in `storage.FileInfo`; empty: any.
    """
    name = storage.base_name(url)
    try:
        size, found = storage.file_info(url)
    except FileNotFoundError:
        raise OutdatedError(f"{name} is missing in the export; run stage=export to make it again") from None
    if storage.is_local(url):
        inside = storage.local_path(folder).resolve()
        if not storage.local_path(url).resolve().is_relative_to(inside):
            raise OutdatedError(f"{name} is a link to outside of the export, which is not followed")
    if num_bytes is not None and size != num_bytes:
        raise OutdatedError(
            f"{name} has {size} bytes, {num_bytes} expected by its manifest; run stage=export to make it again"
        )
    if version and found and found != version:
        raise OutdatedError(
            f"{name} was rewritten since the server started; compare it with SHA256SUMS, then start the server again"
        )
