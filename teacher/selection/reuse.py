"""select.keep_images: a later generation keeps the images that were chosen before it, and their copies; only the labels are new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from data import storage
from data.labels.label_files import LabeledShard, copies_digests, read_copies, read_labels, read_labels_manifest
from pipeline.core.layout import Layout
from pipeline.core.stage import StageError, require_done
from teacher.selection.copies import ShardCounts, write_rows
from teacher.selection.cutoffs import Int64, SelectRule, UInt16
from teacher.selection.label_reader import Exclusions, LabelRows, LabelSource
from teacher.selection.selection_file import REASONS, SCHEMA_VERSION
from teacher.selection.threads import Executor, Progress, in_threads


@dataclass(frozen=True)
class _Before:
    """The labels and the selection of the generation before: folders, and what was committed in them, by shard name."""

    labels: str
    selection: str
    entries: Mapping[str, LabeledShard]
    copies: Mapping[str, str]


def kept_before(layout: Layout) -> tuple[str, str]:
    """Folder and digest of the selection whose images are kept: that of the generation before.

    Raises:
        StageError: there is none.
    """
    before = replace(layout, generation=layout.generation - 1)
    folder = before.current_selection()
    if folder is None:
        raise StageError(
            f"select.keep_images=true: generation {before.generation} has no selection; run stage=select for it"
        )
    return folder, str(require_done(folder, "select")["digest"])


def keep_images(
    layout: Layout,
    kept_from: str,
    entries: Mapping[str, LabeledShard],
    num_classes: int,
    exclusions: Exclusions,
    out_dir: str,
    *,
    num_workers: int = 1,
    executor: Executor = in_threads,
    progress: Progress | None = None,
) -> tuple[Mapping[str, ShardCounts], Int64]:
    """Write each shard's copies as they were in the generation before; images that are excluded by now have none.

    Args:
        kept_from: the folder of the selection before (see `kept_before`).
        entries: of the labels' manifest, by shard name.

    Returns:
        Counts by shard name, and int64 (4, num_classes) by new label: rows that are not excluded, images kept, copies, and of the
        kept ones the lowest confidence as the bits of a float32 (all ones: none is kept).
    """
    labels, record = replace(layout, generation=layout.generation - 1).labels, require_done(kept_from, "select")
    before = _Before(labels, kept_from, read_labels_manifest(labels), copies_digests(record))
    source = LabelSource(layout.labels, _everything(num_classes), exclusions, entries)
    write, shards = partial(_keep, source, before, out_dir), list(entries)
    counts: dict[str, ShardCounts] = {}
    total = _nothing(num_classes)
    for part, classes in executor(write, shards, num_workers, "keep", progress):
        counts |= part
        _add(total, classes)
    return {shard: counts[shard] for shard in shards}, total


def kept_json(
    counts: Mapping[str, ShardCounts],
    classes: Int64,
    kept_from: str,
    names: Sequence[str] | None,
    exclusions: Exclusions,
) -> dict[str, Any]:
    """A selection.json of kept images: as `selection_json` where that applies; `over_quota` are those not chosen before.

    Args:
        counts, classes: of `keep_images`.
        kept_from: the folder of the selection before.
    """
    available, kept, copies, lowest = classes
    entries = [
        {
            "class": index, "available": int(available[index]), "kept": int(kept[index]), "copies": int(copies[index]),
            "cut_off": {"confidence": _confidence(int(lowest[index])), "hash": f"{0:#018x}"}, "shortfall": 0,
        } | ({"name": names[index]} if names else {})
        for index in range(classes.shape[1])
    ]  # fmt: skip
    totals = {name: sum(getattr(shard, name) for shard in counts.values()) for name in ShardCounts.__annotations__}
    reasons = {name: totals.pop(name) for name in REASONS}
    return {
        "schema_version": SCHEMA_VERSION,
        "kept_from": kept_from,
        "rule": asdict(_everything(classes.shape[1])),
        "exclusions": {"digest": exclusions.digest()},
        "totals": totals | {"shortfall": 0},
        "reasons": reasons,
        "empty_classes": [entry["class"] for entry in entries if not entry["kept"]],
        "classes": entries,
        "shards": [{"shard": shard, **vars(shard_counts)} for shard, shard_counts in counts.items()],
    }  # fmt: skip


def _keep(
    source: LabelSource, before: _Before, out_dir: str, shards: Iterable[str]
) -> tuple[dict[str, ShardCounts], Int64]:
    counts, classes = {}, _nothing(source.rule.num_classes)
    with storage.writing_together() as writing:
        for shard in shards:
            copies_of = _copies_before(before, shard, classes)
            counts[shard] = write_rows(source, shard, out_dir, copies_of, writing)
    return counts, classes


def _copies_before(before: _Before, shard: str, classes: Int64) -> Callable[[LabelRows], UInt16]:
    """Looks copies up by ordinal, and counts them into `classes`; a shard that is new has none."""
    known = np.zeros(1, np.uint16)
    if (entry := before.entries.get(shard)) is not None:
        url, copies_url = (storage.join(folder, f"{shard}.parquet") for folder in (before.labels, before.selection))
        ordinals = read_labels(url, ["ordinal"], entry).column("ordinal").to_numpy()
        found = read_copies(copies_url, before.copies.get(shard))
        if len(found) != len(ordinals):
            raise StageError(f"{copies_url}: of other labels than {url}; run stage=select for that generation again")
        known = np.zeros(int(ordinals.max(initial=0)) + 2, np.uint16)
        known[ordinals] = found

    def copies_of(rows: LabelRows) -> UInt16:
        assert rows.ordinal is not None
        copies = known.take(rows.ordinal, mode="clip")  # the last entry is 0
        copies *= rows.eligible
        kept, num_classes = copies > 0, classes.shape[1]
        counted, label = _nothing(num_classes), rows.label[kept]
        counted[0] = np.bincount(rows.label[rows.eligible], minlength=num_classes)
        counted[1] = np.bincount(label, minlength=num_classes)
        counted[2] = np.bincount(label, copies[kept], minlength=num_classes)  # as float64: exact
        np.minimum.at(counted[3], label, rows.key[kept].astype(np.int64))
        _add(classes, counted)
        return copies

    return copies_of


def _everything(num_classes: int) -> SelectRule:
    return SelectRule(num_classes, confidence_threshold=0.0, per_class=None, max_copies=1)


def _nothing(num_classes: int) -> Int64:
    return np.array([[0], [0], [0], [2**32 - 1]], np.int64).repeat(num_classes, axis=1)


def _add(total: Int64, part: Int64) -> None:
    total[:3] += part[:3]
    np.minimum(total[3], part[3], out=total[3])


def _confidence(key: int) -> float:
    return 1.0 if key == 2**32 - 1 else float(np.array([key], np.uint32).view(np.float32)[0])
