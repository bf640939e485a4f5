"""The index of a shard: a Parquet table with one row per sample in shard order, so that counts and places are known without the tar.

Columns: `key`, `extension`, `offset` and `size` of the image's bytes in the tar, `label` (null without one), `problem` (empty when
    there is none).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pyarrow as pa

from .. import storage
from ..errors import DataError
from ..storage.redact import redacted
from ..tables import read_table
from .findings import index_metadata
from .samples import Sample, iterate_samples, mark_parted

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
INDEX_REMEDY = "if this project packed the shard, pack it again; else delete the index and run again, which indexes the shard again"


def build_index(url: str) -> pa.Table:
    """Index a shard in one pass over its headers. A problem becomes a row, not an exception."""
    with storage.open_read(url) as file:
        samples = list(iterate_samples(file))
    mark_parted(samples)
    return index_table(samples)


def index_table(samples: Sequence[Sample]) -> pa.Table:
    """The index of a shard with these samples.

    Metadata: `rule` (INDEX_RULE); `odd_keys`, the number of usable samples with a repeated key or one that
        `data.shards.samples.check_key` refuses, and `odd_key`, the first such key; `ignored`, the image members that are in no row
        (see `data.shards.findings`).
    """
    columns = {name: [getattr(sample, name) for sample in samples] for name in INDEX_SCHEMA.names}
    return pa.table(columns, schema=INDEX_SCHEMA.with_metadata(index_metadata(samples)))


def read_index(url: str, digest: str) -> pa.Table:
    """A shard's index. Raises DataError when it is damaged or its digest is not `digest`."""
    table = read_table(url, INDEX_REMEDY, schema=INDEX_SCHEMA)
    if index_digest(table) != digest:
        raise DataError(f"{redacted(url)}: damaged index (digest differs); {INDEX_REMEDY}")
    return table


def index_digest(table: pa.Table) -> str:
    """Hex digest of an index's rows, whatever their Parquet encoding."""
    digest = hashlib.sha256()
    for column in INDEX_SCHEMA.names:
        digest.update("\n".join(map(str, table.column(column).to_pylist())).encode())
    return digest.hexdigest()[:16]
