"""The search for near-duplicates of held-out images: once for each set of labels and held-out images, before anything is selected."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from data import storage
from data.held_out import HeldOut, read_held_out
from data.label_files import LabeledShard, read_labels, read_manifest
from data.manifest import write_table
from data.redact import redacted
from pipeline.fields import Config
from pipeline.layout import Layout
from pipeline.stage import Fingerprint, done_record, open_stage, require_done
from teacher.hash_index import COMPLETE_DISTANCE
from teacher.near_duplicates import MAX_DISTANCE, Found, Search
from teacher.threads import Progress, in_threads

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
        entries = read_manifest(layout.labels)
        found = _search(config, layout, held_out, entries, progress)
        tables = list(_listing(held_out, found))
        write_table(stage.path(LISTING_NAME), pa.concat_tables([LISTING_SCHEMA.empty_table(), *tables]))
        stage.commit([LISTING_NAME], _summary(held_out, found))
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
    table = read_labels(storage.join(searched.folder, LISTING_NAME), ["shard", "ordinal"])
    ordinals: dict[str, list[int]] = {}
    for shard, ordinal in zip(table.column("shard").to_pylist(), table.column("ordinal").to_pylist(), strict=True):
        ordinals.setdefault(shard, []).append(ordinal)
    return ordinals


def _held_out(config: Config) -> HeldOut:
    return read_held_out(storage.expand(config.data.held_out_hashes))


def _fingerprint(config: Config, held_out: HeldOut, labels: Mapping[str, Any]) -> Fingerprint:
    method = {
        "near_duplicates.complete_distance": COMPLETE_DISTANCE,
        "near_duplicates.max_distance": MAX_DISTANCE,
        "select.copy_correlation": config.select.copy_correlation,
    }
    return Fingerprint(method, {"labels": labels["digest"], "held_out": held_out.digest})


def _search(
    config: Config, layout: Layout, held_out: HeldOut, entries: Sequence[LabeledShard], progress: Progress | None
) -> dict[str, Found]:
    """What was found, by shard name, in the labels' order."""
    search, urls, by_name = (
        Search(held_out, config.select.copy_correlation),
        _where_shards_are(config),
        {entry.name: entry for entry in entries},
    )

    def task(names: Iterable[str]) -> dict[str, Found]:
        return {name: search.in_shard(layout.labels, name, _if_there(urls.get(name), by_name[name])) for name in names}

    found: dict[str, Found] = {}
    for part in in_threads(task, list(by_name), min(os.cpu_count() or 1, _MAX_THREADS), "near-duplicates", progress):
        found |= part
    return {name: found[name] for name in by_name}


def _where_shards_are(config: Config) -> dict[str, str]:
    """Shard name → URL of the unlabeled shards; none where labels have traveled alone."""
    try:
        return {storage.base_name(url).removesuffix(".tar"): url for url in storage.expand(config.data.unlabeled)}
    except storage.StorageError:
        return {}


def _if_there(url: str | None, entry: LabeledShard) -> str | None:
    """The URL, if a shard is there, of the size that was labeled."""
    return url if url and storage.exists(url) and storage.size(url) == entry.source_bytes else None


def _listing(held_out: HeldOut, found: Mapping[str, Found]) -> Iterator[pa.Table]:
    files = [redacted(url) for url in held_out.urls]
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
        yield pa.table(columns, schema=LISTING_SCHEMA)


def _summary(held_out: HeldOut, found: Mapping[str, Found]) -> dict[str, int]:
    return {
        "held_out": len(held_out.hashes),
        "labels": sum(one.rows for one in found.values()),
        "proposed": sum(one.proposed for one in found.values()),
        "not_seen": sum(one.not_seen for one in found.values()),
        "near_duplicates": sum(len(one.matches.image) for one in found.values()),
    }
