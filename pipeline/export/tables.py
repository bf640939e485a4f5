"""Labels without images, one file for each unlabeled shard: Parquet, CSV, or a tar of `.cls` and `.json` beside the shard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from data import storage
from data.labels.joined_tar import JSON_FIELD
from data.labels.label_files import read_labels, read_quarantined
from data.labels.overlay import Overlay, RowFilter
from data.shards.samples import LABEL_FIELD
from data.shards.split import ShardRecord
from data.shards.tar import archive
from data.tables import to_parquet
from pipeline.export.record import Hashing, write_record

EXTENSIONS = {"parquet": "parquet", "columns": "tar", "csv": "csv"}


def write_labels_alone(overlay: Overlay, position: int, keep: RowFilter, form: str, folder: str) -> ShardRecord:
    """Write the labels of the shard at `position` as `<folder>/<shard name>.<extension>`.

    Args:
        form: a key of EXTENSIONS.

    Raises:
        DataError: labels that are not of the shard.
    """
    name = f"{overlay.shards[position].name}.{EXTENSIONS[form]}"
    if form == "columns":
        num_samples, pieces = _columns(overlay, position, keep)
    else:
        table = _table(overlay, position, keep)
        num_samples, pieces = table.num_rows, iter([_as_parquet(table) if form == "parquet" else _as_csv(table)])
    with storage.writing(storage.join(folder, name)) as raw:
        file = Hashing(raw)
        for piece in pieces:
            file.write(piece)
    record = ShardRecord(name=name, bytes=file.size, num_samples=num_samples, index_sha256="", sha256=file.sha256())
    return write_record(folder, record)


def _table(overlay: Overlay, position: int, keep: RowFilter) -> pa.Table:
    """Label rows with the names of shard and class, and copies."""
    rows, names = overlay.rows(position, keep), overlay.provenance.class_names
    labels = rows.labels
    shard = pa.array(np.zeros(len(rows), np.int32))
    columns = {"shard": pa.DictionaryArray.from_arrays(shard, [overlay.shards[position].name])}
    columns |= {name: labels.column(name) for name in labels.column_names}
    if names:
        columns["class_name"] = pa.array(names).take(labels.column("label")).dictionary_encode()
    return pa.table(columns | {"copies": pa.array(rows.copies.astype(np.uint16))})


def _as_parquet(table: pa.Table) -> bytes:
    return to_parquet(table)


def _as_csv(table: pa.Table) -> bytes:
    """Without the lists, which CSV has no form for."""
    lists = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    plain = table.drop_columns(lists)
    for place, field in enumerate(plain.schema):
        if pa.types.is_dictionary(field.type):
            plain = plain.set_column(place, field.name, plain.column(place).cast(pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(plain, buffer)
    return buffer.getvalue()


def _columns(overlay: Overlay, position: int, keep: RowFilter) -> tuple[int, Iterator[bytes]]:
    """A tar with the keys of the shard in its order, to read beside it: of every sample a `.json`, of those with a label a `.cls`.

    Samples that are left out say so (`{"label": null}` and why), as readers of two tars expect the same samples in both.
    """
    rows, index = overlay.rows(position, keep), overlay.shards[position].index()
    shard = overlay.shards[position].name
    url = storage.join(overlay.labels_dir, f"{shard}.parquet")
    quarantined = read_quarantined(read_labels(url, ["ordinal"], overlay.committed.get(shard)))
    reasons = {row.ordinal: row.reason for row in quarantined}
    fields = {entry_ordinal: entry.fields for entry_ordinal, entry in zip(
        rows.labels.column("ordinal").to_pylist(), overlay.entries(rows).part(0, len(rows)), strict=True
    )}  # fmt: skip

    def members() -> Iterator[tuple[str, bytes]]:
        for ordinal, key in enumerate(index.column("key").to_pylist()):
            left_out = {"label": None, "reason": reasons.get(ordinal, "not selected")}
            said = fields.get(ordinal, {JSON_FIELD: json.dumps(left_out).encode()})
            yield from ((f"{key}.{field}", said[field]) for field in (LABEL_FIELD, JSON_FIELD) if field in said)

    return index.num_rows, archive(members())
