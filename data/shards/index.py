"""The index of a shard: a Parquet table with one row per sample in shard order, which tells counts and places without opening the tar.

Columns: `key`, `extension`, `offset` and `size` of the image member in the tar (bytes), `label` (null without one), `problem` (empty
when there is none).
"""

from __future__ import annotations

import hashlib

import pyarrow as pa

from data import storage
from data.errors import DataError
from data.shards.findings import index_metadata
from data.shards.samples import iterate_samples, mark_parted
from data.storage.redact import redacted
from data.tables import read_table

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("extension", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field("problem", pa.string()),
    ]
)
INDEX_REMEDY = (
    "if this project packed the shard, pack it again; else delete the index and run again, which makes it anew"
)


def build_index(url: str) -> pa.Table:
    """Index a shard in one pass over its headers. Problems become rows, not exceptions.

    The table's metadata has the `rule` by which members became samples; counts the usable samples whose key occurs before in this
    shard or could not be written (see `data.shards.samples.check_key`): `odd_keys`, and `odd_key`, the first of them; and counts image
    members that are labeled in no row: `ignored` (see `data.shards.findings`).
    """
    with storage.open_read(url) as file:
        samples = list(iterate_samples(file))
    mark_parted(samples)
    columns = {name: [getattr(sample, name) for sample in samples] for name in INDEX_SCHEMA.names}
    return pa.table(columns, schema=INDEX_SCHEMA.with_metadata(index_metadata(samples)))


def read_index(url: str, digest: str) -> pa.Table:
    """A shard's index table. Raises DataError when it is damaged, or its digest is not the one recorded."""
    table = read_table(url, INDEX_REMEDY, schema=INDEX_SCHEMA)
    if index_digest(table) != digest:
        raise DataError(f"{redacted(url)}: damaged index (digest differs); {INDEX_REMEDY}")
    return table


def index_digest(table: pa.Table) -> str:
    """Digest of an index's content, independent of how Parquet stores it."""
    digest = hashlib.sha256()
    for column in INDEX_SCHEMA.names:
        digest.update("\n".join(map(str, table.column(column).to_pylist())).encode())
    return digest.hexdigest()[:16]
