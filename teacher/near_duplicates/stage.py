"""Search for near-duplicates of held-out images, once for each set of labels and held-out images, before the first selection.

It works in parts of `_SHARDS_PER_PART` shards and saves the result of each, so that an interrupted search continues. It takes minutes
for 130 million varied images, but hours where many look alike, as in Fashion-MNIST: hashes propose half of all images, which are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from data import storage
from data.images.held_out_hashes import HeldOutHashes, read_held_out_hashes
from data.labels.label_files import LabeledShard, read_labels_manifest
from data.shards.split import urls_by_name
from data.storage.redact import redacted
from data.tables import read_table, write_table
from pipeline.core.committed_files import read_output_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, done_record, open_stage, require_done
from teacher.executors import ReportProgress, Threads
from teacher.near_duplicates.hash_index import COMPLETE_DISTANCE
from teacher.near_duplicates.search import MAX_DISTANCE, NearDuplicateSearch, ShardResult

LISTING_NAME = "listing.parquet"
LISTING_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("ordinal", pa.int32()),
        pa.field("__key__", pa.string()),
        pa.field("held_out_file", pa.string()),
        pa.field("held_out_row", pa.int64()),
        pa.field("distance", pa.uint8()),  # number of differing bits of the hashes
        pa.field("correlation", pa.float32()),  # of the thumbnails; null if the image could not be read
        pa.field("flipped", pa.bool_()),
    ]
)
_NAME = "near_duplicates"
_REMEDY = "delete it and run stage=select, which searches again"
_PARTS, _COUNTS_KEY = "parts", b"counts"
_COUNTS = ("labels", "proposed", "not_seen")
IN_GREY = "compared_in_grey"  # of the near-duplicates; in a summary only where there are some
_SHARDS_PER_PART = 128  # at most so many are searched again after an interruption
_MAX_THREADS = 16


class SearchResult(NamedTuple):
    """Folder and done-record of a finished search."""

    folder: str
    record: dict[str, Any]


def find_near_duplicates(
    config: Config,
    layout: Layout,
    labels: Mapping[str, Any],
    force: bool = False,
    progress: ReportProgress | None = None,
) -> SearchResult | None:
    """Search, or return the finished search; None if no held-out images are configured.

    Args:
        labels: the labels' done-record.
        force: search again.

    Raises:
        DataError: files of data.held_out_hashes are missing or cannot be used.
    """
    if not config.data.held_out_hashes:
        return None
    held_out, expected, folder = _open(config, layout, labels)
    stage = open_stage(folder, _NAME, expected, force)
    if not stage.is_done:
        parts = _search(config, layout, held_out, stage, progress)
        write_table(stage.path(LISTING_NAME), pa.concat_tables([part.replace_schema_metadata() for part in parts]))
        stage.commit([LISTING_NAME], _summary(held_out, parts))
        storage.remove(stage.path(_PARTS))
    return SearchResult(stage.folder, require_done(stage.folder, _NAME))


def recorded(config: Config, layout: Layout, labels: Mapping[str, Any]) -> SearchResult | None:
    """Return the finished search; None if there is none. Raises DataError as `find_near_duplicates`."""
    if not config.data.held_out_hashes:
        return None
    _, _, folder = _open(config, layout, labels)
    record = done_record(folder)
    return SearchResult(folder, record) if record is not None else None


def read_listing(searched: SearchResult) -> dict[str, list[int]]:
    """Read the ordinals of the near-duplicates, by shard name. Raises DataError if the listing is missing or damaged."""
    table = read_output_table(searched.folder, LISTING_NAME, searched.record, _REMEDY, ["shard", "ordinal"])
    ordinals: dict[str, list[int]] = {}
    for shard, ordinal in zip(table.column("shard").to_pylist(), table.column("ordinal").to_pylist(), strict=True):
        ordinals.setdefault(shard, []).append(ordinal)
    return ordinals


def _open(config: Config, layout: Layout, labels: Mapping[str, Any]) -> tuple[HeldOutHashes, Fingerprint, str]:
    """The held-out images, and the fingerprint and folder of the search."""
    held_out = read_held_out_hashes(storage.expand(config.data.held_out_hashes))
    method = {
        "near_duplicates.complete_distance": COMPLETE_DISTANCE,
        "near_duplicates.max_distance": MAX_DISTANCE,
        "select.copy_correlation": config.select.copy_correlation,
    }
    expected = Fingerprint(method, {"labels": labels["digest"], "held_out": held_out.digest})
    return held_out, expected, storage.join(layout.near_duplicates, expected.digest())


def _search(
    config: Config, layout: Layout, held_out: HeldOutHashes, stage: Stage, progress: ReportProgress | None
) -> list[pa.Table]:
    """The listing in parts, in the labels' order, with `_counts` in their metadata; parts of an interrupted search are reused."""
    search, urls = NearDuplicateSearch(held_out, config.select.copy_correlation), urls_by_name(config.data.unlabeled)
    labeled = read_labels_manifest(layout.labels)
    names = list(labeled)

    def task(shards: Iterable[str]) -> dict[str, ShardResult]:
        return {
            name: search.search_shard(layout.labels, name, _unchanged_url(urls.get(name), labeled[name]), labeled[name])
            for name in shards
        }

    waits = not all(map(storage.is_local, [layout.labels, *urls.values()]))  # for a store, with most of its time
    num_threads = _MAX_THREADS if waits else min(os.cpu_count() or 1, _MAX_THREADS)
    parts = []
    for first in range(0, max(len(names), 1), _SHARDS_PER_PART):
        shards = names[first : first + _SHARDS_PER_PART]
        url = stage.path(f"{_PARTS}/{first:06d}-{len(shards)}.parquet")  # another version may take other parts
        if not storage.exists(url):
            found: dict[str, ShardResult] = {}
            threads = Threads(num_threads, _offset(progress, first, len(names)))
            for results in threads(task, shards, "near-duplicates"):
                found |= results
            write_table(url, _listing(held_out, {name: found[name] for name in shards}))
        parts.append(read_table(url, _REMEDY, schema=LISTING_SCHEMA))
    return parts


def _offset(progress: ReportProgress | None, before: int, total: int) -> ReportProgress | None:
    """Report the progress of one part as progress of all shards."""
    return progress and (lambda doing, begun, _: progress(doing, before + begun, total))


def _unchanged_url(url: str | None, entry: LabeledShard) -> str | None:
    """The URL, if the shard still has the size that was labeled; else None. Raises StorageError as `urls_by_name`."""
    try:
        return url if url and storage.size(url) == entry.source_bytes else None
    except (FileNotFoundError, storage.MissingError):
        return None


def _listing(held_out: HeldOutHashes, found: Mapping[str, ShardResult]) -> pa.Table:
    files = [redacted(url) for url in held_out.urls]
    tables = [LISTING_SCHEMA.empty_table()]
    for name, result in found.items():
        matches = result.matches
        columns = [
            pa.array([name] * len(matches.image), pa.string()),
            result.table.column("ordinal"),
            result.table.column("__key__"),
            pa.array([files[file] for file in held_out.files[matches.image]], pa.string()),
            pa.array(held_out.rows[matches.image]),
            pa.array(matches.distance),
            pa.array(matches.correlation, from_pandas=True),  # NaN becomes null
            pa.array(matches.flipped),
        ]
        tables.append(pa.table(columns, schema=LISTING_SCHEMA))
    return pa.concat_tables(tables).replace_schema_metadata({_COUNTS_KEY: json.dumps(_counts(found.values()))})


def _counts(found: Collection[ShardResult]) -> dict[str, int]:
    """Label rows, proposed rows, proposed rows whose image could not be read, and near-duplicates compared in grey."""
    return {
        "labels": sum(result.rows for result in found),
        "proposed": sum(result.proposed for result in found),
        "not_seen": sum(result.not_seen for result in found),
        IN_GREY: sum(int(result.matches.in_grey.sum()) for result in found),
    }


def _summary(held_out: HeldOutHashes, parts: Sequence[pa.Table]) -> dict[str, int]:
    counts = [json.loads(part.schema.metadata[_COUNTS_KEY]) for part in parts]
    total = {name: sum(count[name] for count in counts) for name in _COUNTS}
    in_grey = sum(count.get(IN_GREY, 0) for count in counts)  # an earlier version did not count them
    found = {"near_duplicates": sum(part.num_rows for part in parts)} | ({IN_GREY: in_grey} if in_grey else {})
    return {"held_out": len(held_out.hashes), **total, **found}
