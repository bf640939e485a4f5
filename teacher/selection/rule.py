"""The rule of a selection: thresholds from the configuration, or from the validation images where a precision is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from data import storage
from data.labels.label_files import LABELS_OUTPUT_REMEDY
from pipeline.core.committed_files import read_output_table
from pipeline.core.layout import Layout
from pipeline.core.schema import SelectConfig
from pipeline.core.stage import done_record
from teacher.selection.cutoffs import UNREACHED, SelectRule
from teacher.selection.precision import VALIDATION_NAME, HeldOut, choose_thresholds


def read_held_out(layout: Layout) -> HeldOut:
    """The validation images as the teacher labeled them; none where the labels were made without. Raises DataError: damaged."""
    url = storage.join(layout.labels, VALIDATION_NAME)
    if not storage.exists(url):  # labels of an earlier version
        return HeldOut(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    columns = ["label", "predicted", "confidence"]
    record = done_record(layout.labels)
    return HeldOut.from_table(read_output_table(layout.labels, VALIDATION_NAME, record, LABELS_OUTPUT_REMEDY, columns))


def make_rule(config: SelectConfig, num_classes: int, held_out: HeldOut) -> SelectRule:
    """What the configuration asks for. Raises SelectError when `target_precision` cannot be reached."""
    least, target = config.confidence_threshold, config.target_precision
    thresholds: tuple[float, ...] = ()
    if target is not None:
        thresholds = tuple(choose_thresholds(held_out, target, least, num_classes, config.precision_by_class).tolist())
        least = min(thresholds)
    return SelectRule(
        num_classes, least, config.per_class, config.max_copies, thresholds if len(set(thresholds)) > 1 else ()
    )


def print_precision(found: dict[str, Any] | None) -> None:
    """What was promised and what the check of it found (see `precision_json`); silent without a promise."""
    if found is None or found["target"] is None:
        return
    thresholds = [entry["threshold"] for entry in found["classes"] if entry["threshold"] < UNREACHED]
    none_kept = len(found["classes"]) - len(thresholds)
    low, high, chosen, checked = min(thresholds), max(thresholds), found["chosen_on"], found["checked_on"]
    interval = (
        f": {checked['precision']:.1%} ({checked['low']:.1%} to {checked['high']:.1%})" if checked["images"] else ""
    )
    without = f"{none_kept} classes never are so often right: none of theirs is kept. " if none_kept else ""
    print(
        f"select: target_precision={found['target']}: threshold {low:.4f}{f' to {high:.4f}' * (low < high)}, chosen on half of the "
        f"validation images ({chosen['right']} of {chosen['images']} above it are right); of the other half {checked['right']} of "
        f"{checked['images']}{interval}. Verdict: {found['verdict']}. "
        f"{without}This goes for images like the labeled ones."
    )
