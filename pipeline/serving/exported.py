"""An exported version as it lies there: its shards, their labels, and the manifests beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from data import storage
from data.labels.overlay import RowFilter
from data.labels.sources.archives import LABELS_FOLDER
from data.names import check_base_name, is_base_name
from data.shards.image_reader import Place, read_image
from data.shards.split import MANIFEST_NAME, Manifest, ShardRecord
from data.tables import parse_table
from pipeline.core.stage import StageError, require_done
from pipeline.export.manifests import read_manifest
from pipeline.serving.catalog import Kind, SampleImage, ShardEntry
from pipeline.serving.filters import FilterError
from pipeline.serving.items import Item, OutdatedError, bytes_body, file_body, read_file

_SAMPLE_SHARDS, _SAMPLES_EACH, _MOST_SAMPLE_BYTES = 4, 6, 4 << 20
_MEDIA_TYPES = {"json": "application/json", "md": "text/markdown; charset=utf-8"}


@dataclass(frozen=True)
class ExportedVersion:
    """A catalog of the files of an export.

    Attributes:
        files: the shards under their own names too, where timm and wids look for them.
        tables: bytes and SHA-256 of each shard's labels as they were committed, by path.
    """

    folder: str
    manifest: Manifest
    generation: int
    title: str
    class_counts: Sequence[Mapping[str, Any]]
    beside: Mapping[str, Item]
    kind: Kind = "export"
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order, where they are known."""
        return tuple(self.manifest.class_names) if self.manifest.class_names else None

    @cached_property
    def files(self) -> Mapping[str, Item]:
        """Manifests, and the shards beside them."""
        return {**{record.name: self._tar(record) for record in self.manifest.shards}, **self.beside}

    @cached_property
    def _records(self) -> Mapping[str, ShardRecord]:
        return {record.name.removesuffix(".tar"): record for record in self.manifest.shards}

    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """No filter. Raises FilterError for any."""
        if query:
            raise FilterError(
                f"{query[0][0]}: an export is served as its files are, without a filter; expected no parameters. "
                "A server with serve.source=run filters"
            )
        return RowFilter()

    def shard(self, name: str, keep: RowFilter) -> Item | None:  # noqa: ARG002 (the catalog's interface)
        """A shard; its ETag is its SHA-256."""
        record = self._records.get(name)
        return self._tar(record) if record else None

    def labels(self, name: str, keep: RowFilter) -> Item | None:  # noqa: ARG002 (the catalog's interface)
        """Its labels."""
        if (record := self._records.get(name)) is None:
            return None
        path = f"{LABELS_FOLDER}/{name}.parquet"
        committed = self.tables.get(path, {})
        check = partial(check_file, self.folder, storage.join(self.folder, path), committed.get("bytes"))
        etag = f'"{committed.get("sha256", f"{record.sha256}-labels")}"'
        return Item(etag, "application/vnd.apache.parquet", check, lambda: bytes_body(self._table(path)))

    def _table(self, path: str) -> bytes:
        """Content of a label table. Raises OutdatedError where it is not the one that was committed."""
        content = read_file(storage.join(self.folder, path))
        if self.tables.get(path, {}).get("sha256") not in (None, hashlib.sha256(content).hexdigest()):
            raise OutdatedError(f"{path} has changed since the export was made; run stage=export, or restore it")
        return content

    def _tar(self, record: ShardRecord) -> Item:
        url = storage.join(self.folder, record.name)
        check = partial(check_file, self.folder, url, record.bytes)
        return Item(f'"{record.sha256}"', "application/x-tar", check, partial(file_body, url, record.bytes))

    def entries(self, keep: RowFilter) -> list[ShardEntry]:  # noqa: ARG002 (the catalog's interface)
        """All shards."""
        return [ShardEntry(name, r.num_samples, r.sha256, r.bytes) for name, r in self._records.items()]

    def samples(self) -> list[SampleImage]:
        """Images of a few shards, spread evenly over each."""
        names = list(self._records)
        chosen = np.unique(np.linspace(0, len(names) - 1, _SAMPLE_SHARDS).astype(int)).tolist()
        return [sample for at in chosen for sample in self._samples_of(names[at])]

    def _samples_of(self, name: str) -> Iterator[SampleImage]:
        labels, record = f"{LABELS_FOLDER}/{name}.parquet", self._records[name]
        columns = ["__key__", "offset", "size", "label", "confidence"]
        remedy = "delete it and run stage=export, which makes it again"
        table = parse_table(self._table(labels), storage.join(self.folder, labels), remedy, columns)
        places = np.unique(np.linspace(0, max(table.num_rows - 1, 0), _SAMPLES_EACH).astype(int))
        places = places[: table.num_rows]
        for ordinal, row in zip(places.tolist(), table.take(places).to_pylist(), strict=True):
            if 0 <= row["size"] <= _MOST_SAMPLE_BYTES and row["offset"] >= 0:
                place = Place(ordinal, row["__key__"], row["offset"], row["size"])
                yield SampleImage(row["label"], row["confidence"], place.key, partial(self._image, record, place))

    def _image(self, record: ShardRecord, place: Place) -> bytes:
        url = storage.join(self.folder, record.name)
        check_file(self.folder, url, record.bytes)
        return read_image(url, place)


def open_version(folder: str, class_counts: Sequence[Mapping[str, Any]]) -> ExportedVersion:
    """The export in a folder, its small files in memory: not the shards, nor the tables of each.

    Raises:
        StageError: it is not whole, or has labels alone.
        DataError: its manifest names files elsewhere.
        OutdatedError: one of its small files is missing, or a link to somewhere else.
    """
    record = require_done(folder, "export")
    if (form := record["fingerprint"]["config"].get("export.format", "shards")) != "shards":
        raise StageError(
            f"{folder}: labels alone (export.format={form}); expected an export with images, or serve.source=run"
        )
    outputs, summary, manifest = record["outputs"], record["summary"], read_manifest(folder)
    for shard in manifest.shards:
        check_base_name(shard.name, storage.join(folder, MANIFEST_NAME))
    names = [name for name in outputs if name != MANIFEST_NAME and is_base_name(name)]
    beside = {name: _small_file(folder, name) for name in names}
    tables = {name: facts for name, facts in outputs.items() if name.startswith(f"{LABELS_FOLDER}/")}
    title = f"export {storage.base_name(folder)}, generation {summary['generation']}"
    return ExportedVersion(folder, manifest, summary["generation"], title, class_counts, beside, tables=tables)


def _small_file(folder: str, name: str) -> Item:
    url = storage.join(folder, name)
    check_file(folder, url, None)
    content = read_file(url)
    media_type = _MEDIA_TYPES.get(name.rpartition(".")[2], "text/plain; charset=utf-8")
    body = bytes_body(content)
    return Item(f'"{hashlib.sha256(content).hexdigest()}"', media_type, lambda: None, lambda: body)


def check_file(folder: str, url: str, num_bytes: int | None) -> None:
    """Raises OutdatedError for a file that is missing, has another size, or is a link to outside of the export's folder."""
    name = storage.base_name(url)
    try:
        size = storage.size(url)
    except FileNotFoundError:
        raise OutdatedError(f"{name} is missing in the export; run stage=export, which makes it again") from None
    if storage.is_local(url):
        inside = storage.local_path(folder).resolve()
        if not storage.local_path(url).resolve().is_relative_to(inside):
            raise OutdatedError(f"{name} is a link to outside of the export and is not followed")
    if num_bytes is not None and size != num_bytes:
        raise OutdatedError(
            f"{name} has {size} bytes, and {num_bytes} by its manifest; run stage=export, which makes it again"
        )
