"""The files beside a split's shards: `sources.parquet`, `hashes.parquet`, `rejected.txt`. Memory does not grow with the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, chain

import pyarrow as pa

from .. import storage
from ..errors import DataError
from ..images.held_out_hashes import write_hash_tables
from ..shards.split import MANIFEST_NAME, Manifest, Shard
from ..tables import open_table, write_table_parts
from .lines import LineWriter, read_lines, sort_lines
from .packed_shards import finished_tables, key_of
from .screening import SplitJob

SOURCES_NAME = "sources.parquet"  # key → path
REJECTED_NAME = "rejected.txt"  # what was left out, and why
_SOURCES = pa.schema([pa.field("key", pa.string()), pa.field("path", pa.string())])
_ROWS = 100_000


def write_sidecars(job: SplitJob, num_shards: int, rejected: Iterable[str], left_out: Iterable[str]) -> None:
    """Write the files from the records of the split's shards.

    Args:
        rejected: lines for `rejected.txt` of images after the last shard.
        left_out: lines for `rejected.txt` of files that are no images.
    """
    lines = f"{job.scratch}/rejected"
    with LineWriter(lines) as file:
        write_table_parts(storage.join(job.folder, SOURCES_NAME), _SOURCES, _sources(job, num_shards, file))
        for line in rejected:
            file.add(line)
    if job.labels is not None:
        write_hash_tables(job.folder, lambda: (table for table, _ in finished_tables(job, num_shards)))
    with storage.writing(storage.join(job.folder, REJECTED_NAME)) as target:
        for line in sort_lines(chain(left_out, read_lines(lines)), job.scratch):
            target.write(f"{line}\n".encode())


def _sources(job: SplitJob, num_shards: int, rejected: LineWriter) -> Iterator[pa.Table]:
    """Keys and paths of each shard; writes what was rejected before they end."""
    first = 0
    for table, lines in finished_tables(job, num_shards):
        keys = [key_of(number) for number in range(first, first + table.num_rows)]
        yield pa.table([pa.array(keys, pa.string()), table.column("path")], schema=_SOURCES)
        first += table.num_rows
        for line in lines:
            rejected.add(line)


def paths_of(shard: Shard) -> pa.ChunkedArray | None:
    """The path of each image of a shard, in order; None for a shard without `sources.parquet` beside it.

    Raises DataError when the file is damaged, or of other shards.
    """
    folder = storage.parent(shard.url)
    url = storage.join(folder, SOURCES_NAME)
    if not (shard.sha256 and storage.exists(url)):
        return None
    start = _starts(folder)[f"{shard.name}.tar"]
    with open_table(url, "remove it to do without paths") as file:
        return file.read_rows(start, shard.num_samples, ["path"]).column(0)


@lru_cache(8)  # not once for each of thousands of shards
def _starts(folder: str) -> dict[str, int]:
    """Shard → number of images before it in the split."""
    shards = Manifest.model_validate_json(storage.read_bytes(storage.join(folder, MANIFEST_NAME))).shards
    return dict(
        zip((shard.name for shard in shards), accumulate((s.num_samples for s in shards), initial=0), strict=False)
    )


def read_sources(folder: str) -> Iterator[str]:
    """The paths of the images that were packed into a split, in order, a few at a time.

    Raises:
        DataError: `sources.parquet` does not exist or is damaged.
    """
    url = storage.join(folder, SOURCES_NAME)
    remedy = "pack into another out="
    try:
        with open_table(url, remedy) as file:
            for batch in file.batches(_ROWS, ["path"]):
                yield from batch.column(0).to_pylist()
    except FileNotFoundError as error:
        raise DataError(f"{url}: not there; {remedy}") from error
