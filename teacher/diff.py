"""stage=diff: what changed between two generations' labels, or between two selections of the same labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data import storage
from data.labels.label_files import LabeledShard, copies_digests, read_copies, read_labels, read_labels_manifest
from pipeline.core.layout import PREVIOUS_NAME, VERSION, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, require_done
from teacher.selection.cutoffs import Int64
from teacher.selection.processes import threads_or_processes

_SHOWN = 10  # lines on the screen


@dataclass(frozen=True)
class Side:
    """Labels and a selection of them.

    Attributes:
        entries: of the labels' manifest, by shard name.
        copies: SHA-256 of the selection's files, by shard name.
    """

    name: str
    labels: str
    selection: str
    num_classes: int
    class_names: tuple[str, ...] | None
    entries: Mapping[str, LabeledShard]
    copies: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Counts:
    """Images by class before and after; those that only one side has labels of are `gone` or `new`.

    Attributes:
        same: int64 (C,), images on both sides with the same label.
        flips: images on both sides by (label before, label after), where these differ: seldom all C × C pairs.
        gone, new: int64 (C,).
        kept: int64 (2, 2, C) kept before, kept after, by the label after (before, for images that are gone).
        copies: int64 (2,), before and after.
    """

    same: Int64
    flips: Counter[tuple[int, int]]
    gone: Int64
    new: Int64
    kept: Int64
    copies: Int64

    @staticmethod
    def zeros(num_classes: int) -> Counts:
        """Of nothing."""
        same, gone, new, kept, copies = (
            np.zeros(shape, np.int64) for shape in (*[num_classes] * 3, (2, 2, num_classes), 2)
        )
        return Counts(same, Counter(), gone, new, kept, copies)

    def add(self, other: Counts) -> None:
        """Add other images. In place."""
        self.flips.update(other.flips)
        for name in ("same", "gone", "new", "kept", "copies"):
            getattr(self, name)[:] += getattr(other, name)

    def flipped(self) -> tuple[Int64, Int64]:
        """Images on both sides whose label changed, int64 (C,) each: by the label before, by the label after."""
        pairs = np.array([*self.flips], np.int64).reshape(-1, 2)
        images = np.array([*self.flips.values()], np.int64)
        totals = [np.zeros_like(self.same) for _ in range(2)]
        for side, total in enumerate(totals):
            np.add.at(total, pairs[:, side], images)
        return totals[0], totals[1]


def diff(
    config: Config, layouts: Iterable[Layout], before: str | None = None, after: str | None = None
) -> dict[str, Any]:
    """Compare, print, and write `RUN/diff.json`; returns what is in it.

    Args:
        before, after: a generation (`2`), one of its selections (`1/9f3a…`), or an export (`v1`). By default `after` is the last
            generation that has a selection, and `before` the generation before it, or in the first one the selection before the
            current one.

    Raises:
        StageError: there is no such generation or selection, or nothing to compare.
    """
    by_generation = {str(layout.generation): layout for layout in layouts}
    exports = config.export.out or Layout(config.run_dir).exports
    before, after = (_selection_in(exports, name) for name in (before, after))
    one, two = _choose_sides(by_generation, before, after)
    if one.num_classes != two.num_classes:
        raise StageError(
            f"{one.labels} has {one.num_classes} classes, {two.labels} {two.num_classes}: nothing to compare"
        )
    result = as_json(one, two, compare(one, two))
    url = storage.join(config.run_dir, "diff.json")
    storage.write_text(url, json.dumps(result, indent=1) + "\n")
    print_changes(result)
    print(f"diff: {url}")
    return result


def compare(before: Side, after: Side) -> Counts:
    """Count what changed, shard by shard, images joined by shard and ordinal."""
    names = sorted({*before.entries, *after.entries})
    total = Counts.zeros(after.num_classes)
    with threads_or_processes(len(names)) as (executor, number):
        for part in executor(partial(_count, before, after), names, number, "compare"):
            total.add(part)
    return total


def as_json(before: Side, after: Side, counts: Counts) -> dict[str, Any]:
    """What diff.json holds."""
    flipped, num_classes = counts.flips.total(), after.num_classes
    common = int(counts.same.sum()) + flipped
    pairs = sorted(counts.flips.items(), key=lambda item: (-item[1], item[0]))[: 10 * num_classes]
    kept = counts.kept.sum(axis=2)
    return {
        "before": before.name,
        "after": after.name,
        "images": {"both": common, "gone": int(counts.gone.sum()), "new": int(counts.new.sum())},
        "flipped": flipped,
        "flip_rate": flipped / common if common else None,
        "kept": {"both": int(kept[1, 1]), "only_before": int(kept[1, 0]), "only_after": int(kept[0, 1])},
        "copies": dict(zip(("before", "after"), counts.copies.tolist(), strict=True)),
        "classes": _classes_json(after, counts),
        "flips": [
            {"before": _name(after, one), "after": _name(after, two), "images": images} for (one, two), images in pairs
        ],
    }


def print_changes(result: dict[str, Any]) -> None:
    """The changes in a few lines."""
    images, kept = result["images"], result["kept"]
    print(f"diff: {result['before']} → {result['after']}")
    if result["flip_rate"] is not None:
        print(f"  {result['flipped']:,} of {images['both']:,} labels flipped ({result['flip_rate']:.2%})")
    if images["gone"] or images["new"]:
        print(f"  images without a label now: {images['gone']:,}; without one before: {images['new']:,}")
    print(
        f"  kept: {kept['both']:,} still, {kept['only_before']:,} no more, {kept['only_after']:,} newly; "
        f"copies {result['copies']['before']:,} → {result['copies']['after']:,}"
    )
    moved = [entry for entry in result["classes"] if entry["labels_before"] != entry["labels_after"]]
    changed = moved or [entry for entry in result["classes"] if entry["kept_before"] != entry["kept_after"]]
    for entry in sorted(changed, key=lambda entry: -_drift(entry))[:_SHOWN]:
        print(
            f"  {entry['class']}: labels {entry['labels_before']:,} → {entry['labels_after']:,}, "
            f"kept {entry['kept_before']:,} → {entry['kept_after']:,}"
        )
    for flip in result["flips"][:_SHOWN]:
        print(f"  {flip['before']} → {flip['after']}: {flip['images']:,} labels")


def _drift(entry: dict[str, Any]) -> int:
    return abs(entry["labels_after"] - entry["labels_before"]) + abs(entry["kept_after"] - entry["kept_before"])


def _count(before: Side, after: Side, shards: Iterable[str]) -> Counts:
    part = Counts.zeros(after.num_classes)
    for shard in shards:
        _add_shard(part, before, after, shard)
    return part


def _add_shard(part: Counts, before: Side, after: Side, shard: str) -> None:
    ordinal_1, label_1 = _read_labels(before, shard)
    ordinal_2, label_2 = (ordinal_1, label_1) if after.labels == before.labels else _read_labels(after, shard)
    copies_1, copies_2 = _read_copies(before, shard, len(label_1)), _read_copies(after, shard, len(label_2))
    part.copies[:] += np.array([copies_1.sum(dtype=np.int64), copies_2.sum(dtype=np.int64)])
    kept_1, kept_2 = copies_1 > 0, copies_2 > 0
    if ordinal_1 is not ordinal_2:
        _, rows_1, rows_2 = np.intersect1d(ordinal_1, ordinal_2, assume_unique=True, return_indices=True)
        alone_1, alone_2 = (
            np.delete(np.arange(len(o)), rows) for o, rows in ((ordinal_1, rows_1), (ordinal_2, rows_2))
        )
        part.gone[:] += np.bincount(label_1[alone_1], minlength=len(part.gone))
        part.new[:] += np.bincount(label_2[alone_2], minlength=len(part.new))
        _add_kept(part, kept_1[alone_1], False, label_1[alone_1])
        _add_kept(part, False, kept_2[alone_2], label_2[alone_2])
        label_1, label_2, kept_1, kept_2 = label_1[rows_1], label_2[rows_2], kept_1[rows_1], kept_2[rows_2]
    part.same[:] += np.bincount(label_2[label_1 == label_2], minlength=after.num_classes)
    changed = label_1 != label_2
    part.flips.update(zip(label_1[changed].tolist(), label_2[changed].tolist(), strict=True))
    _add_kept(part, kept_1, kept_2, label_2)


def _add_kept(part: Counts, before: np.ndarray | bool, after: np.ndarray | bool, label: np.ndarray) -> None:
    """Count rows by what was and is kept and by label, all [n] (or one truth for all rows), into `part.kept`. In place."""
    cell = label + part.kept.shape[2] * (2 * np.asarray(before, np.int64) + np.asarray(after, np.int64))
    part.kept[:] += np.bincount(cell, minlength=part.kept.size).reshape(part.kept.shape)


def _read_labels(side: Side, shard: str) -> tuple[np.ndarray, np.ndarray]:
    """Ordinal and label of a shard's rows; none where the side does not have the shard."""
    if (entry := side.entries.get(shard)) is None:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    table = read_labels(storage.join(side.labels, f"{shard}.parquet"), ["ordinal", "label"], entry)
    return table.column("ordinal").to_numpy(), table.column("label").to_numpy()


def _read_copies(side: Side, shard: str, num_rows: int) -> np.ndarray:
    """How often each row is kept, uint16 (num_rows,)."""
    if not num_rows:
        return np.empty(0, np.uint16)
    url = storage.join(side.selection, f"{shard}.parquet")
    copies = read_copies(url, side.copies.get(shard))
    if len(copies) != num_rows:
        raise StageError(f"{url} is of other labels than {side.labels}/{shard}.parquet; run stage=select again")
    return copies


def _classes_json(side: Side, counts: Counts) -> list[dict[str, Any]]:
    flipped_away, flipped_here = counts.flipped()
    columns = {
        "labels_before": counts.same + flipped_away + counts.gone,
        "labels_after": counts.same + flipped_here + counts.new,
        "flipped_away": flipped_away,
        "kept_before": counts.kept[1].sum(axis=0),
        "kept_after": counts.kept[:, 1].sum(axis=0),
    }
    return [
        {"class": _name(side, index)} | {name: int(values[index]) for name, values in columns.items()}
        for index in range(side.num_classes)
    ]


def _name(side: Side, index: int) -> str:
    return side.class_names[index] if side.class_names else str(index)


def _selection_in(exports: str, name: str | None) -> str | None:
    """The selection that an export was made of; other names as they are. Raises StageError for one that is not there."""
    if name is None or not VERSION.fullmatch(name):
        return name
    summary = require_done(storage.join(exports, name), "export")["summary"]
    return f"{summary['generation']}/{summary['selection']}"


def _choose_sides(layouts: dict[str, Layout], before: str | None, after: str | None) -> tuple[Side, Side]:
    if after is None:
        selected = [number for number, layout in layouts.items() if layout.current_selection()]
        if not selected:
            raise StageError("stage=diff: nothing is selected yet; run stage=label first")
        after = selected[-1]
    generation = int(after.partition("/")[0]) if after.partition("/")[0].isdigit() else 0
    if before is None and generation > 1:
        before = str(generation - 1)
    if before is None and str(generation) in layouts:
        before = f"{generation}/{_previous(layouts[str(generation)])}"
    return side(layouts, before or ""), side(layouts, after)


def _previous(layout: Layout) -> str:
    pointer = storage.join(layout.selections, PREVIOUS_NAME)
    if not storage.exists(pointer):
        raise StageError(
            "stage=diff: there is one selection of one generation; try another setting (stage=select select.per_class=…), "
            "or name two, as in before=1 after=2"
        )
    return storage.read_text(pointer).strip()


def side(layouts: dict[str, Layout], name: str) -> Side:
    """The labels and the selection that `1` or `1/9f3a…` names. Raises StageError when they are not there."""
    number, _, digest = name.partition("/")
    layout = layouts.get(number)
    if layout is None:
        raise StageError(
            f"stage=diff: {name!r} is none of the generations {', '.join(layouts)}; as in before=1 after=2, or after=1/9f3a…"
        )
    current = layout.current_selection()
    there = [entry for entry in storage.list_names(layout.selections) if ".old-" not in entry]  # those were moved aside
    found = [entry for entry in there if digest and entry.startswith(digest)]
    if digest and len(found) != 1:
        raise StageError(f"stage=diff: {name!r}: {len(found)} selections in {layout.selections} begin so; expected one")
    folder = storage.join(layout.selections, found[0]) if found else current
    if folder is None:
        raise StageError(f"stage=diff: generation {number} has no selection; run stage=select first")
    labels, selection = require_done(layout.labels, "label"), require_done(folder, "select")
    if selection["fingerprint"]["inputs"]["labels"] != labels["digest"]:
        raise StageError(
            f"stage=diff: {folder} was selected from other labels than {layout.labels} has now; nothing to compare"
        )
    labels = labels["summary"]
    names = labels["class_names"]
    return Side(
        f"{number}/{storage.base_name(folder)}",
        layout.labels,
        folder,
        labels["num_classes"],
        tuple(names) if names else None,
        read_labels_manifest(layout.labels),
        copies_digests(selection),
    )
