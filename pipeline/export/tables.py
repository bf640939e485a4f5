"""Write labels without images, one file per unlabeled shard: Parquet, CSV, or a tar of `.cls` and `.json`."""

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
from data.packing.sidecars import paths_of
from data.shards.samples import LABEL_FIELD
from data.shards.split import ShardRecord
from data.shards.tar import archive
from data.tables import to_parquet
from pipeline.export.plan import EXTENSIONS
from pipeline.export.shards import HashingWriter


def write_label_file(
    overlay: Overlay, position: int, row_filter: RowFilter, file_format: str, folder: str
) -> ShardRecord:
    """Write the labels of the unlabeled shard at `position` as `<folder>/<shard name>.<extension>`; `file_format`: a key of EXTENSIONS.

    Raises DataError when labels and shard do not match.
    """
    name = f"{overlay.shards[position].name}.{EXTENSIONS[file_format]}"
    if file_format == "columns":
        num_samples, pieces = _label_tar(overlay, position, row_filter)
    else:
        table = _table(overlay, position, row_filter)
        num_samples, pieces = table.num_rows, iter([to_parquet(table) if file_format == "parquet" else _as_csv(table)])
    with storage.writing(storage.join(folder, name)) as raw:
        file = HashingWriter(raw)
        for piece in pieces:
            file.write(piece)
    return ShardRecord(name=name, bytes=file.size, num_samples=num_samples, index_sha256="", sha256=file.sha256())


def _table(overlay: Overlay, position: int, row_filter: RowFilter) -> pa.Table:
    """Return the label rows with shard name, path before packing (where it is known), class name and copies."""
    rows, names = overlay.rows(position, row_filter), overlay.provenance.class_names
    labels = rows.labels
    shard = pa.array(np.zeros(len(rows), np.int32))
    columns = {"shard": pa.DictionaryArray.from_arrays(shard, [overlay.shards[position].name])}
    columns |= {name: labels.column(name) for name in labels.column_names}
    if (paths := paths_of(overlay.shards[position])) is not None:
        columns["path"] = paths.take(labels.column("ordinal"))
    if names:
        columns["class_name"] = pa.array(names).take(labels.column("label")).dictionary_encode()
    return pa.table(columns | {"copies": pa.array(rows.copies.astype(np.uint16))})


def _as_csv(table: pa.Table) -> bytes:
    """Return the table as CSV, without its list columns."""
    lists = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    plain = table.drop_columns(lists)
    for number, field in enumerate(plain.schema):
        if pa.types.is_dictionary(field.type):
            plain = plain.set_column(number, field.name, plain.column(number).cast(pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(plain, buffer)
    return buffer.getvalue()


def _label_tar(overlay: Overlay, position: int, row_filter: RowFilter) -> tuple[int, Iterator[bytes]]:
    """Return number of samples and bytes of a tar with the shard's keys in its order: `.json` each, `.cls` if labeled.

    Left-out samples have `{"label": null, "reason": …}`: readers that zip two tars need the same samples in both.
    """
    rows, index = overlay.rows(position, row_filter), overlay.shards[position].index()
    shard = overlay.shards[position].name
    url = overlay.files(position)[0]
    labels = read_labels(url, ["ordinal"], overlay.committed.get(shard))
    quarantined = read_quarantined(labels, url)
    reasons = {row.ordinal: row.reason for row in quarantined}
    ordinals, entries = rows.labels.column("ordinal").to_pylist(), overlay.entries(rows).part(0, len(rows))
    fields = {ordinal: entry.fields for ordinal, entry in zip(ordinals, entries, strict=True)}

    def members() -> Iterator[tuple[str, bytes]]:
        for ordinal, key in enumerate(index.column("key").to_pylist()):
            left_out = {"label": None, "reason": reasons.get(ordinal, "not selected")}
            found = fields.get(ordinal, {JSON_FIELD: json.dumps(left_out).encode()})
            yield from ((f"{key}.{field}", found[field]) for field in (LABEL_FIELD, JSON_FIELD) if field in found)

    return index.num_rows, archive(members())
