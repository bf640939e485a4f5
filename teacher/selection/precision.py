"""The precision of labels at or above a confidence, estimated on validation images; thresholds that reach a target precision.

The estimate holds for images like the labeled ones, not for unlabeled images from elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.core.schema import SelectConfig
from teacher.selection.rule import UNREACHED, Float32, SelectError, SelectRule
from teacher.validation_labels import ValidationLabels

MIN_IMAGES = 100  # fewer say little: at a precision of 0.95 the interval of 100 images is 0.89 to 0.98


def make_rule(config: SelectConfig, num_classes: int, validation: ValidationLabels) -> SelectRule:
    """The rule of a configuration. Raises SelectError if no threshold reaches `target_precision`."""
    threshold, target = config.confidence_threshold, config.target_precision
    thresholds: tuple[float, ...] = ()
    if target is not None:
        chosen = choose_thresholds(validation, target, threshold, num_classes, config.precision_by_class)
        threshold, thresholds = float(chosen.min()), tuple(chosen.tolist())
    by_class = thresholds if len(set(thresholds)) > 1 else ()
    return SelectRule(num_classes, threshold, config.per_class, config.max_copies, by_class)


def choose_thresholds(
    validation: ValidationLabels, target: float, minimum: float, num_classes: int, by_class: bool = False
) -> Float32:
    """Choose the lowest thresholds whose labels reach a target precision on one half of the validation images.

    Args:
        target: precision of the labels at or above the threshold, 0 to 1.
        minimum: no threshold is lower.
        by_class: a separate threshold for each class with at least MIN_IMAGES predictions in the half; the others share one.

    Returns:
        float32 [num_classes].

    Raises:
        SelectError: no threshold reaches the precision, or there are no validation images.
    """
    if not len(validation):
        raise SelectError(
            f"select.target_precision={target}: the labels were made without validation images; set data.validation "
            "and run stage=label force=true, or set select.confidence_threshold instead"
        )
    half, _ = validation.halves()
    common = _lowest(half, target, minimum)
    if common is None:
        raise SelectError(
            f"select.target_precision={target}: no confidence threshold reaches this precision on {len(half)} validation images; "
            "lower target_precision or train a better teacher"
        )
    thresholds = np.full(num_classes, common, np.float32)
    for index in range(num_classes) if by_class else ():
        rows = half.take(half.predicted == index)
        if len(rows) >= MIN_IMAGES:
            own = _lowest(rows, target, minimum)
            thresholds[index] = UNREACHED if own is None else own
    return thresholds


def _lowest(rows: ValidationLabels, target: float, minimum: float) -> float | None:
    """The lowest threshold ≥ `minimum` at which a fraction `target` of the labels is right; None if there is none."""
    order = np.argsort(-rows.confidence, kind="stable")
    confidence = rows.confidence[order]
    right = np.cumsum(rows.label[order] == rows.predicted[order])
    is_last = np.append(confidence[:-1] > confidence[1:], [True] * min(len(confidence), 1))  # of equal confidences
    reaches = is_last & (right >= target * np.arange(1, len(right) + 1)) & (confidence >= np.float32(minimum))
    if not reaches.any():
        return None
    lowest = int(np.flatnonzero(reaches)[-1])
    rest = confidence[lowest + 1 :]
    return float(confidence[lowest]) if len(rest) and rest[0] >= np.float32(minimum) else minimum


def precision_json(
    validation: ValidationLabels, thresholds: Float32, target: float | None, minimum: float
) -> dict[str, Any] | None:
    """Estimated precision of a selection's labels, in all and per class; None without validation images.

    With a target, the estimate comes from the half that did not choose the thresholds.

    Args:
        thresholds: float32 [num_classes].
        minimum: the thresholds' lower limit.
    """
    if not len(validation):
        return None
    chosen_on, checked_on = validation.halves() if target is not None else (None, validation)
    total = checked_on.at(thresholds).as_json()
    classes = [
        {"class": index, "threshold": float(threshold)}
        | checked_on.take(checked_on.predicted == index).at(thresholds).as_json()
        for index, threshold in enumerate(thresholds)
    ]
    return {
        "target": target,
        "validation_images": len(validation),
        "least_threshold": minimum,
        "chosen_on": None if chosen_on is None else chosen_on.at(thresholds).as_json(),
        "checked_on": total,
        "verdict": None if target is None else describe_check(total, target),
        "classes": classes,
    }


def describe_check(checked: dict[str, Any], target: float) -> str:
    """Whether the estimate (`Precision.as_json`) confirms the target. Part of selection.json: other words would change its digest."""
    if checked["images"] < MIN_IMAGES:
        return f"too few validation images to tell: {checked['images']} at or above the threshold, where {MIN_IMAGES} say something"
    if checked["low"] >= target:
        return "confirmed"
    if checked["high"] < target:
        return "missed: the validation images say less than was asked for"
    return "as asked for, as far as so many images can tell"


def print_precision(found: dict[str, Any] | None) -> None:
    """Print the thresholds and the check of a target precision (`precision_json`); nothing without a target."""
    if found is None or found["target"] is None:
        return
    thresholds = [entry["threshold"] for entry in found["classes"] if entry["threshold"] < UNREACHED]
    excluded = len(found["classes"]) - len(thresholds)
    low, high, chosen, checked = min(thresholds), max(thresholds), found["chosen_on"], found["checked_on"]
    interval = ""
    if checked["images"]:
        interval = f": {checked['precision']:.1%} (95 % interval {checked['low']:.1%} to {checked['high']:.1%})"
    without = f"{excluded} classes reach it at no threshold; none of their images is selected. " if excluded else ""
    print(
        f"select: target_precision={found['target']}: threshold {low:.4f}{f' to {high:.4f}' * (low < high)}, chosen on half of the "
        f"validation images ({chosen['right']} of {chosen['images']} labels at or above it are right); on the other half "
        f"{checked['right']} of {checked['images']}{interval}. Verdict: {found['verdict']}. "
        f"{without}This holds for images like the labeled ones."
    )
