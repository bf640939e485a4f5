"""stage=diff: what changed between two generations' labels, or between two selections of the same labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from data import storage
from data.labels.selected_labels import SelectedLabels
from pipeline.core.layout import PREVIOUS_NAME, VERSION, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, require_done
from teacher.executors import threads_or_processes

Int64 = npt.NDArray[np.int64]
_SHOWN = 10  # lines to print per list


@dataclass(frozen=True)
class Side:
    """Labels and a selection of them.

    Attributes:
        name: `generation/selection digest`.
    """

    name: str
    selected: SelectedLabels
    num_classes: int
    class_names: tuple[str, ...] | None

    def class_name(self, index: int) -> str:
        """The name of a class, or its number if classes have no names."""
        return self.class_names[index] if self.class_names else str(index)


@dataclass(frozen=True, eq=False)
class Counts:
    """Images by class, before and after.

    Attributes:
        same: int64 [num_classes], images on both sides with the same label.
        flips: images on both sides whose label differs, by (label before, label after); few of all pairs occur.
        gone, new: int64 [num_classes], images with a label only before, only after.
        kept: int64 [2, 2, num_classes], images by (selected before, selected after, label after; label before if gone).
        copies: int64 [2], before and after.
    """

    same: Int64
    flips: Counter[tuple[int, int]]
    gone: Int64
    new: Int64
    kept: Int64
    copies: Int64

    @staticmethod
    def zeros(num_classes: int) -> Counts:
        """No images."""
        same, gone, new = (np.zeros(num_classes, np.int64) for _ in range(3))
        return Counts(same, Counter(), gone, new, np.zeros((2, 2, num_classes), np.int64), np.zeros(2, np.int64))

    def add(self, other: Counts) -> None:
        """Add other images. In place."""
        self.flips.update(other.flips)
        for name in ("same", "gone", "new", "kept", "copies"):
            getattr(self, name)[:] += getattr(other, name)

    def flipped(self) -> tuple[Int64, Int64]:
        """Images whose label changed, by the label before and by the label after, int64 [num_classes] each."""
        by_before, by_after = np.zeros_like(self.same), np.zeros_like(self.same)
        for (before, after), images in self.flips.items():
            by_before[before] += images
            by_after[after] += images
        return by_before, by_after


def diff(
    config: Config, layouts: Iterable[Layout], before: str | None = None, after: str | None = None
) -> dict[str, Any]:
    """Compare two sides, print the changes, write them to `RUN/diff.json` and return its content.

    Args:
        before, after: a generation (`2`), one of its selections (`1/9f3a…`), or an export (`v1`). `after` defaults to the last
            generation that has a selection; `before` to the generation before `after`, or in generation 1 to the selection before
            the current one.

    Raises:
        StageError: the generation or selection does not exist, or the two sides cannot be compared.
    """
    by_generation = {str(layout.generation): layout for layout in layouts}
    exports = config.export.out or Layout(config.run_dir).exports
    before, after = (_selection_in(exports, name) for name in (before, after))
    one, two = _choose_sides(by_generation, before, after)
    if one.num_classes != two.num_classes:
        raise StageError(
            f"{one.selected.labels} has {one.num_classes} classes, {two.selected.labels} {two.num_classes}: they cannot be compared"
        )
    result = changes(one, two)
    url = storage.join(config.run_dir, "diff.json")
    storage.write_text(url, json.dumps(result, indent=1) + "\n")
    print_changes(result)
    print(f"diff: {url}")
    return result


def _compare(before: Side, after: Side) -> Counts:
    """Count what changed, shard by shard; images are joined by shard and ordinal."""
    names = sorted({*before.selected.labeled, *after.selected.labeled})
    total = Counts.zeros(after.num_classes)
    with threads_or_processes(len(names)) as executor:
        for part in executor(partial(_count, before.selected, after.selected, after.num_classes), names, "compare"):
            total.add(part)
    return total


def changes(before: Side, after: Side) -> dict[str, Any]:
    """What changed from one side to the other: the content of diff.json."""
    counts = _compare(before, after)
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
            {"before": after.class_name(one), "after": after.class_name(two), "images": images}
            for (one, two), images in pairs
        ],
    }


def print_changes(result: dict[str, Any]) -> None:
    """Print the changes (`changes`) in a few lines."""
    images, kept = result["images"], result["kept"]
    print(f"diff: {result['before']} → {result['after']}")
    if result["flip_rate"] is not None:
        print(f"  {result['flipped']:,} of {images['both']:,} labels flipped ({result['flip_rate']:.2%})")
    if images["gone"] or images["new"]:
        print(f"  images without a label now: {images['gone']:,}; without one before: {images['new']:,}")
    print(
        f"  kept: {kept['both']:,} as before, {kept['only_before']:,} no longer, {kept['only_after']:,} newly; "
        f"copies {result['copies']['before']:,} → {result['copies']['after']:,}"
    )

    def drift(entry: dict[str, Any]) -> int:
        return -sum(abs(entry[f"{what}_after"] - entry[f"{what}_before"]) for what in ("labels", "kept"))

    moved = [entry for entry in result["classes"] if entry["labels_before"] != entry["labels_after"]]
    changed = moved or [entry for entry in result["classes"] if entry["kept_before"] != entry["kept_after"]]
    for entry in sorted(changed, key=drift)[:_SHOWN]:
        print(
            f"  {entry['class']}: labels {entry['labels_before']:,} → {entry['labels_after']:,}, "
            f"kept {entry['kept_before']:,} → {entry['kept_after']:,}"
        )
    for flip in result["flips"][:_SHOWN]:
        print(f"  {flip['before']} → {flip['after']}: {flip['images']:,} labels")


def _count(before: SelectedLabels, after: SelectedLabels, num_classes: int, shards: Iterable[str]) -> Counts:
    part = Counts.zeros(num_classes)
    for shard in shards:
        _add_shard(part, before, after, shard)
    return part


def _add_shard(part: Counts, before: SelectedLabels, after: SelectedLabels, shard: str) -> None:
    one = _read_rows(before, shard)
    has_same_labels = after.labels == before.labels and shard in after.labeled
    two = replace(one, copies=after.copies(shard, len(one.label))) if has_same_labels else _read_rows(after, shard)
    part.copies[:] += np.array([one.copies.sum(dtype=np.int64), two.copies.sum(dtype=np.int64)])
    if one.ordinal is not two.ordinal:
        one, two = _add_unmatched(part, one, two)
    changed = one.label != two.label
    part.same[:] += np.bincount(two.label[~changed], minlength=len(part.same))
    part.flips.update(zip(one.label[changed].tolist(), two.label[changed].tolist(), strict=True))
    _add_kept(part, one.copies > 0, two.copies > 0, two.label)


def _add_unmatched(part: Counts, one: _Rows, two: _Rows) -> tuple[_Rows, _Rows]:
    """Count the images that only one side has; return the rows of the others, in one order."""
    _, rows_1, rows_2 = np.intersect1d(one.ordinal, two.ordinal, assume_unique=True, return_indices=True)
    gone = one.take(np.delete(np.arange(len(one.ordinal)), rows_1))
    new = two.take(np.delete(np.arange(len(two.ordinal)), rows_2))
    part.gone[:] += np.bincount(gone.label, minlength=len(part.gone))
    part.new[:] += np.bincount(new.label, minlength=len(part.new))
    _add_kept(part, gone.copies > 0, False, gone.label)
    _add_kept(part, False, new.copies > 0, new.label)
    return one.take(rows_1), two.take(rows_2)


def _add_kept(part: Counts, before: np.ndarray | bool, after: np.ndarray | bool, label: np.ndarray) -> None:
    """Count rows into `part.kept`. `before` and `after`: selected or not, bool [n] or one value for all rows; label [n]."""
    cell = label + part.kept.shape[2] * (2 * np.asarray(before, np.int64) + np.asarray(after, np.int64))
    part.kept[:] += np.bincount(cell, minlength=part.kept.size).reshape(part.kept.shape)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Label rows of a shard: ordinal int32, label int32, copies uint16, all [n]."""

    ordinal: np.ndarray
    label: np.ndarray
    copies: np.ndarray

    def take(self, rows: np.ndarray) -> _Rows:
        return _Rows(self.ordinal[rows], self.label[rows], self.copies[rows])


def _read_rows(selected: SelectedLabels, shard: str) -> _Rows:
    """A shard's rows; none if it has no labels there."""
    if shard not in selected.labeled:
        return _Rows(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.uint16))
    rows, copies = selected.read(shard, ["ordinal", "label"])
    return _Rows(rows.column("ordinal").to_numpy(), rows.column("label").to_numpy(), copies)


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
        {"class": side.class_name(index)} | {name: int(values[index]) for name, values in columns.items()}
        for index in range(side.num_classes)
    ]


def _selection_in(exports: str, name: str | None) -> str | None:
    """Replace the name of an export by the selection that it was made from. Raises StageError if there is no such export."""
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
            "stage=diff: there is only one selection; make another (stage=select select.per_class=…), "
            "or name two generations, as in before=1 after=2"
        )
    return storage.read_text(pointer).strip()


def side(layouts: dict[str, Layout], name: str) -> Side:
    """Open the labels and the selection that `1` or `1/9f3a…` names. Raises StageError if they do not exist."""
    number, _, digest = name.partition("/")
    layout = layouts.get(number)
    if layout is None:
        raise StageError(
            f"stage=diff: expected a generation ({', '.join(layouts)}) but got {name!r}; as in before=1 after=2, or after=1/9f3a…"
        )
    folder = _selection_folder(layout, digest, name) if digest else layout.current_selection()
    if folder is None:
        raise StageError(f"stage=diff: generation {number} has no selection; run stage=select first")
    labels, selection = require_done(layout.labels, "label"), require_done(folder, "select")
    if selection["fingerprint"]["inputs"]["labels"] != labels["digest"]:
        raise StageError(
            f"stage=diff: {folder} was selected from other labels than {layout.labels} has now; they cannot be compared"
        )
    names = labels["summary"]["class_names"]
    return Side(
        name=f"{number}/{storage.base_name(folder)}",
        selected=SelectedLabels.of(layout.labels, folder, selection),
        num_classes=labels["summary"]["num_classes"],
        class_names=tuple(names) if names else None,
    )


def _selection_folder(layout: Layout, digest: str, name: str) -> str:
    names = (entry for entry in storage.list_names(layout.selections) if ".old-" not in entry)  # not those moved aside
    found = [entry for entry in names if entry.startswith(digest)]
    if len(found) != 1:
        raise StageError(
            f"stage=diff: {name!r} must name one selection in {layout.selections} but matches {len(found)}"
        )
    return storage.join(layout.selections, found[0])
