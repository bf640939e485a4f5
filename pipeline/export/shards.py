"""One shard of an export: original image bytes with their labels, its index, and its labels as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.joined_tar import Entry, LabelEntries, Rows, sample_bytes
from data.labels.overlay import Overlay
from data.labels.sources.archives import LABELS_FOLDER
from data.shards.image_reader import ImageReader
from data.shards.index import INDEX_SCHEMA, index_digest
from data.shards.split import INDEX_FOLDER, DataError, ShardRecord
from data.shards.tar import end_of_archive
from data.tables import read_table, write_table
from pipeline.export.plan import Part
from pipeline.export.record import Hashing, write_record

_CHUNK = 64  # samples made at once


def tables_of(record: ShardRecord) -> list[str]:
    """The tables beside a file of an export, with a row for each of its samples; none beside labels alone, which have no index."""
    stem = record.name.removesuffix(".tar")
    return [f"{folder}/{stem}.parquet" for folder in (INDEX_FOLDER, LABELS_FOLDER)] if record.index_sha256 else []


def has_tables(folder: str, record: ShardRecord) -> bool:
    """Whether they are there and whole."""
    try:
        tables = [read_table(storage.join(folder, name), "") for name in tables_of(record)]
    except (DataError, FileNotFoundError):
        return False
    return all(table.num_rows == record.num_samples for table in tables)


def write_images(overlay: Overlay, part: Part, folder: str, name: str) -> ShardRecord:
    """Write `<folder>/<name>.tar`, its index and its labels; the same bytes for the same rows.

    Raises:
        DataError: an unlabeled shard that was cut short, or labels that are not of it.
    """
    rows = rows_of(overlay, part)
    tar, index = f"{name}.tar", list[dict[str, object]]()
    with (
        storage.writing(storage.join(folder, tar)) as raw,
        ImageReader([shard.url for shard in overlay.shards]) as reader,
    ):
        file = Hashing(raw)
        for entry, before, image, after in _samples(overlay.entries(rows), reader):
            file.write(before)
            index.append(_index_row(entry, file.size))
            file.write(image)
            file.write(after)
        file.write(end_of_archive(file.size))
    table = pa.Table.from_pylist(index, schema=INDEX_SCHEMA)
    write_table(storage.join(folder, INDEX_FOLDER, f"{name}.parquet"), table)
    write_table(storage.join(folder, LABELS_FOLDER, f"{name}.parquet"), _labels(overlay, rows, table))
    digest = index_digest(table)
    return write_record(
        folder, ShardRecord(name=tar, bytes=file.size, num_samples=len(rows), index_sha256=digest, sha256=file.sha256())
    )


def rows_of(overlay: Overlay, part: Part) -> Rows:
    """The label rows of a part, in its order."""
    shards, place = np.unique(part.shard, return_inverse=True)
    found: list[Rows] = []
    at = np.empty(len(part), np.int64)
    for number, shard in enumerate(shards):
        wanted, where = np.unique(part.row[place == number], return_inverse=True)
        at[place == number] = where + sum(len(rows) for rows in found)
        found.append(overlay.take(int(shard), wanted))
    chosen = _together(found).take(at)
    return Rows(chosen.labels, chosen.shard, chosen.copies, part.number, chosen.extension)


def _together(found: Sequence[Rows]) -> Rows:
    shard, copies, number = (
        np.concatenate([getattr(rows, name) for rows in found]) for name in ("shard", "copies", "number")
    )
    extension = pa.chunked_array([chunk for rows in found for chunk in rows.extension.chunks], pa.string())
    return Rows(pa.concat_tables([rows.labels for rows in found]), shard, copies, number, extension)


def _samples(entries: LabelEntries, reader: ImageReader) -> Iterator[tuple[Entry, bytes, bytes, bytes]]:
    for start in range(0, len(entries), _CHUNK):
        some = list(entries.part(start, min(start + _CHUNK, len(entries))))
        for entry, pieces in zip(some, sample_bytes(some, reader), strict=True):
            yield entry, *pieces


def _index_row(entry: Entry, offset: int) -> dict[str, object]:
    label = int(entry.fields["cls"])
    return {
        "key": entry.key, "extension": entry.extension, "offset": offset, "size": entry.size, "label": label, "problem": "",
    }  # fmt: skip


def _labels(overlay: Overlay, rows: Rows, index: pa.Table) -> pa.Table:
    """What is known of each sample: its key, place and label here, and where it comes from."""
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
