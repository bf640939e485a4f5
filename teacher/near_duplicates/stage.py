"""The search for near-duplicates of held-out images: once for each set of labels and held-out images, before anything is selected.

Some shards at a time: what was found in them is a file of its own until all are searched, so that a search that was stopped goes on
where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from data import storage
from data.images.held_out_hashes import HeldOutHashes, read_held_out_hashes
from data.labels.label_files import LabeledShard, read_labels_manifest
from data.storage.redact import redacted
from data.tables import read_table, write_table
from pipeline.core.committed_files import read_output_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, done_record, open_stage, require_done
from teacher.near_duplicates.hash_index import COMPLETE_DISTANCE
from teacher.near_duplicates.search import MAX_DISTANCE, Found, Search
from teacher.selection.threads import Progress, in_threads

LISTING_NAME = "listing.parquet"
LISTING_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string()),
        pa.field("ordinal", pa.int32()),
        pa.field("__key__", pa.string()),
        pa.field("held_out_file", pa.string()),
        pa.field("held_out_row", pa.int64()),
        pa.field("distance", pa.uint8()),  # bits in which the hashes differ
        pa.field("correlation", pa.float32()),  # of the thumbnails; null where the image was not there
        pa.field("flipped", pa.bool_()),
    ]
)
_NAME = "near_duplicates"
_REMEDY = "delete it and run stage=select, which searches again"
_PARTS, _COUNTS_KEY = "parts", b"counts"
_TOGETHER = 128  # shards that are searched anew, at most, after an interruption: seconds
_MAX_THREADS = 16


class Searched(NamedTuple):
    """A search that is done: its folder and its done-record."""

    folder: str
    record: dict[str, Any]


def find_near_duplicates(
    config: Config, layout: Layout, labels: Mapping[str, Any], force: bool = False, progress: Progress | None = None
) -> Searched | None:
    """Search unless it is done; None where no held-out images are configured.

    Args:
        labels: the labels' done-record.
        force: search again.

    Raises:
        DataError: held-out files that are missing or cannot be used.
    """
    if not config.data.held_out_hashes:
        return None
    held_out = _held_out(config)
    expected = _fingerprint(config, held_out, labels)
    stage = open_stage(storage.join(layout.near_duplicates, expected.digest()), _NAME, expected, force)
    if not stage.is_done:
        parts = _search(config, layout, held_out, stage, progress)
        write_table(stage.path(LISTING_NAME), pa.concat_tables([part.replace_schema_metadata() for part in parts]))
        stage.commit([LISTING_NAME], _summary(held_out, parts))
        storage.remove(stage.path(_PARTS))
    return Searched(stage.folder, require_done(stage.folder, _NAME))


def recorded(config: Config, layout: Layout, labels: Mapping[str, Any]) -> Searched | None:
    """The search that was made before; None where there is none. Raises as `find_near_duplicates`."""
    if not config.data.held_out_hashes:
        return None
    folder = storage.join(layout.near_duplicates, _fingerprint(config, _held_out(config), labels).digest())
    record = done_record(folder)
    return Searched(folder, record) if record is not None else None


def read_listing(searched: Searched) -> dict[str, list[int]]:
    """Ordinals of the near-duplicates, by shard name."""
    table = read_output_table(searched.folder, LISTING_NAME, searched.record, _REMEDY, ["shard", "ordinal"])
    ordinals: dict[str, list[int]] = {}
    for shard, ordinal in zip(table.column("shard").to_pylist(), table.column("ordinal").to_pylist(), strict=True):
        ordinals.setdefault(shard, []).append(ordinal)
    return ordinals


def _held_out(config: Config) -> HeldOutHashes:
    return read_held_out_hashes(storage.expand(config.data.held_out_hashes))


def _fingerprint(config: Config, held_out: HeldOutHashes, labels: Mapping[str, Any]) -> Fingerprint:
    method = {
        "near_duplicates.complete_distance": COMPLETE_DISTANCE,
        "near_duplicates.max_distance": MAX_DISTANCE,
        "select.copy_correlation": config.select.copy_correlation,
    }
    return Fingerprint(method, {"labels": labels["digest"], "held_out": held_out.digest})


def _search(
    config: Config, layout: Layout, held_out: HeldOutHashes, stage: Stage, progress: Progress | None
) -> list[pa.Table]:
    """The listing in parts, in the labels' order, with `_counts` in their metadata; those that are there are taken as they are."""
    search, urls = Search(held_out, config.select.copy_correlation), _where_shards_are(config)
    by_name = read_labels_manifest(layout.labels)
    names = list(by_name)

    def task(shards: Iterable[str]) -> dict[str, Found]:
        return {
            name: search.in_shard(layout.labels, name, _if_there(urls.get(name), entry), entry)
            for name, entry in ((name, by_name[name]) for name in shards)
        }

    parts = []
    for first in range(0, max(len(names), 1), _TOGETHER):
        these = names[first : first + _TOGETHER]
        url = stage.path(f"{_PARTS}/{first:06d}-{len(these)}.parquet")  # another version may take others together
        if not storage.exists(url):
            found: dict[str, Found] = {}
            threads = min(os.cpu_count() or 1, _MAX_THREADS)
            for part in in_threads(task, these, threads, "near-duplicates", _of_all(progress, first, len(names))):
                found |= part
            write_table(url, _listing(held_out, {name: found[name] for name in these}))
        parts.append(read_table(url, _REMEDY, schema=LISTING_SCHEMA))
    return parts


def _of_all(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of some of the shards, told as progress of all."""
    return progress and (lambda doing, begun, _: progress(doing, before + begun, total))


def _where_shards_are(config: Config) -> dict[str, str]:
    """Shard name → URL of the unlabeled shards; none where labels have traveled alone. Raises StorageError when nobody can tell: what
    is committed must not depend on an outage."""
    try:
        return {storage.base_name(url).removesuffix(".tar"): url for url in storage.expand(config.data.unlabeled)}
    except storage.MissingError:
        return {}


def _if_there(url: str | None, entry: LabeledShard) -> str | None:
    """The URL, if a shard is there, of the size that was labeled. Raises StorageError as `_where_shards_are`."""
    try:
        return url if url and storage.size(url) == entry.source_bytes else None
    except (FileNotFoundError, storage.MissingError):
        return None


def _listing(held_out: HeldOutHashes, found: Mapping[str, Found]) -> pa.Table:
    files = [redacted(url) for url in held_out.urls]
    tables = [LISTING_SCHEMA.empty_table()]
    for name, one in found.items():
        matches = one.matches
        columns = [
            pa.array([name] * len(matches.image), pa.string()),
            one.table.column("ordinal"),
            one.table.column("__key__"),
            pa.array([files[file] for file in held_out.files[matches.image]], pa.string()),
            pa.array(held_out.rows[matches.image]),
            pa.array(matches.distance),
            pa.array(matches.correlation, from_pandas=True),  # NaN becomes null
            pa.array(matches.flipped),
        ]
        tables.append(pa.table(columns, schema=LISTING_SCHEMA))
    return pa.concat_tables(tables).replace_schema_metadata({_COUNTS_KEY: json.dumps(_counts(found.values()))})


def _counts(found: Iterable[Found]) -> dict[str, int]:
    """Label rows, those that were proposed, and those that could not be looked at."""
    several = list(found)
    return {
        "labels": sum(one.rows for one in several),
        "proposed": sum(one.proposed for one in several),
        "not_seen": sum(one.not_seen for one in several),
    }


def _summary(held_out: HeldOutHashes, parts: Sequence[pa.Table]) -> dict[str, int]:
    counts = [json.loads(part.schema.metadata[_COUNTS_KEY]) for part in parts]
    total = {name: sum(count[name] for count in counts) for name in ("labels", "proposed", "not_seen")}
    return {"held_out": len(held_out.hashes), **total, "near_duplicates": sum(part.num_rows for part in parts)}
