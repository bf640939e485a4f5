"""Write one shard of an export: original image bytes with their labels, its index, and its label table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from data import storage
from data.errors import DataError
from data.labels.joined_tar import Entry, LabelEntries, Rows, frames
from data.labels.overlay import Overlay
from data.labels.sources.archives import LABELS_FOLDER
from data.shards.image_reader import ImageReader
from data.shards.index import INDEX_SCHEMA, index_digest
from data.shards.split import INDEX_FOLDER, ShardRecord
from data.shards.tar import end_of_archive
from data.tables import read_table, write_table
from pipeline.export.plan import RowRefs

_CHUNK = 64  # samples built at once


class HashingWriter:
    """A file being written, with its size in bytes and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def sha256(self) -> str:
        """Return the digest of what was written, in hex."""
        return self._digest.hexdigest()


def tables_of(record: ShardRecord) -> list[str]:
    """Return the paths of a shard's index and label table; empty for a file of labels without images, which has neither."""
    stem = record.name.removesuffix(".tar")
    return [f"{folder}/{stem}.parquet" for folder in (INDEX_FOLDER, LABELS_FOLDER)] if record.index_sha256 else []


def has_tables(folder: str, record: ShardRecord) -> bool:
    """Whether the tables of a shard exist and have a row per sample."""
    try:
        tables = [read_table(storage.join(folder, name), "") for name in tables_of(record)]
    except (DataError, FileNotFoundError):
        return False
    return all(table.num_rows == record.num_samples for table in tables)


def write_image_shard(overlay: Overlay, row_refs: RowRefs, folder: str, name: str) -> ShardRecord:
    """Write `<folder>/<name>.tar`, its index and its label table; the same rows give the same bytes.

    Raises DataError when an unlabeled shard was cut short, or has other labels.
    """
    rows = _read_rows(overlay, row_refs)
    tar, index = f"{name}.tar", list[dict[str, object]]()
    with (
        storage.writing(storage.join(folder, tar)) as raw,
        ImageReader([shard.url for shard in overlay.shards]) as reader,
    ):
        file = HashingWriter(raw)
        for entry, before, image, after in _samples(overlay.entries(rows), reader):
            file.write(before)
            place = {"key": entry.key, "extension": entry.extension, "offset": file.size, "size": entry.size}
            index.append(place | {"label": int(entry.fields["cls"]), "problem": ""})
            file.write(image)
            file.write(after)
        file.write(end_of_archive(file.size))
    table = pa.Table.from_pylist(index, schema=INDEX_SCHEMA)
    write_table(storage.join(folder, INDEX_FOLDER, f"{name}.parquet"), table)
    write_table(storage.join(folder, LABELS_FOLDER, f"{name}.parquet"), _label_table(overlay, rows, table))
    digest = index_digest(table)
    return ShardRecord(name=tar, bytes=file.size, num_samples=len(rows), index_sha256=digest, sha256=file.sha256())


def _read_rows(overlay: Overlay, row_refs: RowRefs) -> Rows:
    """Read label rows, in the order of `row_refs`; each label file once."""
    shards, shard_number = np.unique(row_refs.shard, return_inverse=True)
    found: list[Rows] = []
    position = np.empty(len(row_refs), np.int64)  # of each row in the concatenation of `found`
    for number, shard in enumerate(shards):
        wanted, within = np.unique(row_refs.row[shard_number == number], return_inverse=True)
        position[shard_number == number] = within + sum(len(rows) for rows in found)
        found.append(overlay.take(int(shard), wanted))
    rows = _concatenate(found).take(position)
    return Rows(rows.labels, rows.shard, rows.copies, row_refs.copy, rows.extension)


def _concatenate(found: Sequence[Rows]) -> Rows:
    shard, copies, number = (
        np.concatenate([getattr(rows, name) for rows in found]) for name in ("shard", "copies", "number")
    )
    extension = pa.chunked_array([chunk for rows in found for chunk in rows.extension.chunks], pa.string())
    return Rows(pa.concat_tables([rows.labels for rows in found]), shard, copies, number, extension)


def _samples(entries: LabelEntries, reader: ImageReader) -> Iterator[tuple[Entry, bytes, bytes, bytes]]:
    """For each entry: the entry, the bytes before its image, the image, the bytes after it."""
    parts = (list(entries.part(start, start + _CHUNK)) for start in range(0, len(entries), _CHUNK))
    chunks = (list(zip(part, frames(part), strict=True)) for part in parts)
    for (entry, (before, after)), image in reader.read_ahead(chunks, lambda item: (item[0].shard, item[0].place)):
        yield entry, before, image, after


def _label_table(overlay: Overlay, rows: Rows, index: pa.Table) -> pa.Table:
    """Return one row per sample: key, position and label in this shard, and its source."""
    names = pa.array([shard.name for shard in overlay.shards])
    labels = rows.labels
    columns = {
        "__key__": index.column("key"),
        "offset": index.column("offset"),
        "size": index.column("size"),
        **{name: labels.column(name) for name in ("label", "confidence", "topk_index", "topk_prob", "rest")},
        "copies": pa.array(rows.copies.astype(np.uint16)),
        "source_shard": names.take(pa.array(rows.shard)).dictionary_encode(),
        "source_ordinal": labels.column("ordinal"),
        "source_key": labels.column("__key__"),
    }
    return pa.table(columns)
