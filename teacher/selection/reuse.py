"""select.keep_images: a later generation reuses the images of the selection before it, and their copies; only the labels are new."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from data import storage
from data.labels.selected_labels import SelectedLabels
from pipeline.core.layout import Layout
from pipeline.core.stage import StageError, require_done
from teacher.executors import ONE_THREAD, Executor
from teacher.selection.copies import ShardCounts, write_copies
from teacher.selection.label_reader import LabelRows, LabelSource
from teacher.selection.rule import NO_CUT, Int64, SelectRule, UInt16


@dataclass(frozen=True, eq=False)
class ReusedClasses:
    """Label rows by new label, all int64 [num_classes].

    Attributes:
        available: rows that are not excluded.
        kept: images with copies.
        copies: copies in all.
        lowest_key: `confidence_key` of the least confident image with copies; NO_CUT if there is none.
    """

    available: Int64
    kept: Int64
    copies: Int64
    lowest_key: Int64

    @staticmethod
    def empty(num_classes: int) -> ReusedClasses:
        """No rows."""
        available, kept, copies = (np.zeros(num_classes, np.int64) for _ in range(3))
        return ReusedClasses(available, kept, copies, np.full(num_classes, NO_CUT, np.int64))

    def add(self, other: ReusedClasses) -> None:
        """Add the rows of other shards. In place."""
        for name in ("available", "kept", "copies"):
            getattr(self, name)[:] += getattr(other, name)
        np.minimum(self.lowest_key, other.lowest_key, out=self.lowest_key)

    def add_rows(self, rows: LabelRows, copies: UInt16) -> None:
        """Add rows with their copies, uint16 [n]. In place."""
        kept, num_classes = copies > 0, len(self.available)
        label = rows.label[kept]
        self.available[:] += np.bincount(rows.label[rows.eligible], minlength=num_classes)
        self.kept[:] += np.bincount(label, minlength=num_classes)
        self.copies[:] += np.bincount(label, copies[kept], minlength=num_classes).astype(np.int64)  # float64: exact
        np.minimum.at(self.lowest_key, label, rows.key[kept].astype(np.int64))


def previous_selection(layout: Layout) -> tuple[str, str]:
    """Folder and digest of the selection to reuse: the current one of the generation before. Raises StageError when there is none."""
    before = replace(layout, generation=layout.generation - 1)
    folder = before.current_selection()
    if folder is None:
        raise StageError(
            f"select.keep_images=true: generation {before.generation} has no selection; run stage=select for it"
        )
    return folder, str(require_done(folder, "select")["digest"])


def every_row(num_classes: int) -> SelectRule:
    """The rule that makes every row eligible."""
    return SelectRule(num_classes, confidence_threshold=0.0, per_class=None, max_copies=1)


def reuse_images(
    layout: Layout, source: LabelSource, reuse_from: str, out_dir: str, executor: Executor = ONE_THREAD
) -> tuple[dict[str, ShardCounts], ReusedClasses]:
    """Write the copies of the generation before for every shard of `source`; images that are excluded now get none.

    Args:
        source: this generation's labels, with the rule `every_row`.
        reuse_from: folder of the selection to reuse (see `previous_selection`).

    Returns:
        Counts by shard name, and by class.

    Raises:
        SelectError: as `LabelSource.read`.
        DataError: as `SelectedLabels.read`, of the generation before.
    """
    labels = replace(layout, generation=layout.generation - 1).labels
    previous = SelectedLabels.of(labels, reuse_from, require_done(reuse_from, "select"))
    write, shards = partial(_write_shards, source, previous, out_dir), list(source.labeled)
    counts: dict[str, ShardCounts] = {}
    total = ReusedClasses.empty(source.rule.num_classes)
    for part, classes in executor(write, shards, "keep"):
        counts |= part
        total.add(classes)
    return {shard: counts[shard] for shard in shards}, total


def _write_shards(
    source: LabelSource, previous: SelectedLabels, out_dir: str, shards: Iterable[str]
) -> tuple[dict[str, ShardCounts], ReusedClasses]:
    counts, classes = {}, ReusedClasses.empty(source.rule.num_classes)
    with storage.writing_together() as writing:
        for shard, batches in source.read_all(shards):
            copies_of = _count_into(classes, _previous_copies(previous, shard))
            url = storage.join(out_dir, f"{shard}.parquet")
            counts[shard] = write_copies(url, batches, copies_of, writing)
    return counts, classes


def _count_into(classes: ReusedClasses, known: UInt16) -> Callable[[LabelRows], UInt16]:
    """Give rows their copies by ordinal, and count them into `classes`."""

    def copies_of(rows: LabelRows) -> UInt16:
        assert rows.ordinal is not None
        copies = known.take(rows.ordinal, mode="clip")  # the last entry is 0
        copies *= rows.eligible
        classes.add_rows(rows, copies)
        return copies

    return copies_of


def _previous_copies(previous: SelectedLabels, shard: str) -> UInt16:
    """Copies by ordinal in the generation before, uint16 [n], and a last 0; that 0 alone for a new shard."""
    if shard not in previous.labeled:
        return np.zeros(1, np.uint16)
    rows, copies = previous.read(shard, ["ordinal"])
    ordinals = rows.column("ordinal").to_numpy()
    known = np.zeros(int(ordinals.max(initial=0)) + 2, np.uint16)
    known[ordinals] = copies
    return known
