"""Write the shards of a split from screened images, each with a record of what is in it, and continue after the last finished one.

    .finished/<shard>.parquet   rows of the shard: `path`, and for labeled images the columns of `hashes.parquet`; in the metadata the
                                shard's entry in the manifest, the places in the split's order that it took, and what was rejected there

These records become the files beside the shards (`data.packing.sidecars`), and are removed when the split is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from .. import storage
from ..images.held_out_hashes import hash_table
from ..shards.split import INDEX_FOLDER, ShardRecord
from ..shards.write import Fields, labeled_members, remove_begun, shard_name, write_shard
from ..tables import open_table, read_table, write_table
from .screening import ScreenedImage, SplitJob

FINISHED_FOLDER = ".finished"
_METADATA = b"packed"
_REMEDY = "remove the folder of the split by hand, and give the same command again"


@dataclass(frozen=True)
class Part:
    """Images of a shard, whose bytes begin at `offset` of a file. `is_last`: no other shard has images in the file."""

    spool: str
    offset: int
    images: list[ScreenedImage]
    is_last: bool


@dataclass(frozen=True)
class PlannedShard:
    """A shard to write.

    Attributes:
        number: of the shard, from 0.
        end: place in the split's order after the last one that the shard took.
        rejected: lines for `rejected.txt`, of images that the shard would have had.
    """

    number: int
    end: int
    parts: list[Part]
    rejected: list[str]


@dataclass(frozen=True)
class Finished:
    """A finished shard; `end` as in `PlannedShard`."""

    record: ShardRecord
    end: int
    rejected: list[str]


def key_of(number: int) -> str:
    """The key of the n-th image of a split."""
    return f"{number:09d}"


def write_planned(job: SplitJob, shard: PlannedShard) -> Finished:
    """Write a shard, its index and, last, its record."""
    name = shard_name(job.name, shard.number)
    record = write_shard(storage.join(job.folder, name), _samples(job, shard))
    finished = Finished(record, shard.end, shard.rejected)
    images = [image for part in shard.parts for image in part.images]
    table = pa.table({"path": [image.path for image in images]})
    if job.labels is not None:
        hashes = hash_table(image.hashes for image in images if image.hashes)
        for field, column in zip(hashes.schema, hashes.columns, strict=True):
            table = table.append_column(field, column)
    facts = {"record": record.model_dump(), "end": shard.end, "rejected": shard.rejected, "digest": job.digest}
    write_table(_record_url(job, shard.number), table.replace_schema_metadata({_METADATA: json.dumps(facts)}))
    return finished


def _samples(job: SplitJob, shard: PlannedShard) -> Iterator[tuple[str, Fields]]:
    number = shard.number * job.samples_per_shard
    for part in shard.parts:
        with Path(part.spool).open("rb") as file:
            file.seek(part.offset)
            for image in part.images:
                yield key_of(number), labeled_members(image.field, file.read(image.size), image.label)
                number += 1


def _record_url(job: SplitJob, number: int) -> str:
    return storage.join(job.folder, FINISHED_FOLDER, shard_name(job.name, number).removesuffix(".tar") + ".parquet")


def find_finished(job: SplitJob) -> list[Finished]:
    """The shards that an interrupted run of the same packing finished, up to the first that it did not. Reads no image.

    Removes all else that it began.
    """
    sizes, indexes = storage.list_sizes(job.folder), storage.list_names(storage.join(job.folder, INDEX_FOLDER))
    records = set(storage.list_names(storage.join(job.folder, FINISHED_FOLDER)))
    found = list[Finished]()
    while shard_name(job.name, len(found)).removesuffix(".tar") + ".parquet" in records.intersection(indexes):
        finished = _read_finished(job, len(found))
        if finished is None or sizes.get(finished.record.name) != finished.record.bytes:
            break
        found.append(finished)
    remove_begun(job.folder, job.name, len(found))
    return found


def _read_finished(job: SplitJob, number: int) -> Finished | None:
    """The record of a shard; None when it is of another packing."""
    with open_table(_record_url(job, number), _REMEDY) as file:
        facts = json.loads(file.metadata[_METADATA])
    if facts["digest"] != job.digest:
        return None
    return Finished(ShardRecord.model_validate(facts["record"]), facts["end"], facts["rejected"])


def finished_tables(job: SplitJob, num_shards: int) -> Iterator[tuple[pa.Table, list[str]]]:
    """The rows of each shard, and the lines for `rejected.txt`, in order; reads several records at once."""

    def read(number: int) -> tuple[pa.Table, list[str]]:
        table = read_table(_record_url(job, number), _REMEDY)
        return table, json.loads(table.schema.metadata[_METADATA])["rejected"]

    return storage.in_parallel(read, range(num_shards), storage.PARALLEL_REQUESTS)


def remove_records(job: SplitJob) -> None:
    """Remove the records of a complete split."""
    storage.remove(storage.join(job.folder, FINISHED_FOLDER))
