"""How many labels at or above a confidence are right: estimated on the validation images, with an interval; and the threshold that
keeps a precision.

The estimate holds for images like the labeled ones. Of unlabeled images from elsewhere nobody knows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa

from teacher.selection.cutoffs import UNREACHED, SelectError

VALIDATION_NAME = "validation.parquet"  # beside the label files
LEAST_IMAGES = 100
"""Fewer say little: at a precision of 0.95 the interval of 100 images is 0.89 to 0.98."""
_Z = 1.96  # standard deviations of a two-sided interval of 95 %


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Validation images as the teacher labels them: label and predicted int32, confidence float32, all (N,)."""

    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @staticmethod
    def from_table(table: pa.Table) -> HeldOut:
        """The rows of a labels folder's `validation.parquet`."""
        return HeldOut(*(table.column(name).to_numpy() for name in ("label", "predicted", "confidence")))

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> HeldOut:
        """The rows of an index or mask."""
        return HeldOut(self.label[rows], self.predicted[rows], self.confidence[rows])

    def halves(self) -> tuple[HeldOut, HeldOut]:
        """Two random halves with the same number of images of each class, give or take one; always the same two."""
        order = np.random.default_rng(0).permutation(len(self))
        order = order[np.argsort(self.label[order], kind="stable")]
        return self.take(np.sort(order[::2])), self.take(np.sort(order[1::2]))

    def at(self, thresholds: np.ndarray) -> Precision:
        """Precision of the labels at or above their class's threshold: float32 (C,)."""
        above = self.confidence >= thresholds[self.predicted]
        return Precision(int(above.sum()), int((above & (self.label == self.predicted)).sum()))


@dataclass(frozen=True)
class Precision:
    """How many of how many labels are right."""

    images: int
    right: int

    def as_json(self) -> dict[str, Any]:
        """With the precision and its 95 % interval after Wilson (JASA 1927, "Probable inference"); None without images."""
        if not self.images:
            return asdict(self) | {"precision": None, "low": None, "high": None}
        n, p = self.images, self.right / self.images
        centre = p + _Z**2 / (2 * n)
        half = _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = ((centre + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1))
        return asdict(self) | {"precision": p, "low": max(low, 0.0), "high": min(high, 1.0)}


def choose_thresholds(
    held_out: HeldOut, target: float, least: float, num_classes: int, by_class: bool = False
) -> np.ndarray:
    """The lowest thresholds whose labels reach a precision on one half of the validation images (see `HeldOut.halves`).

    Args:
        target: precision wanted of the labels at or above the threshold.
        least: no threshold is lower.
        by_class: one of its own for each class that is predicted for LEAST_IMAGES of the half; the others have the common one.

    Returns:
        float32 (num_classes,).

    Raises:
        SelectError: no threshold reaches the precision, or there are no validation images.
    """
    if not len(held_out):
        raise SelectError(
            f"select.target_precision={target}: the labels were made without validation images; give data.validation "
            "and run stage=label force=true, or give select.confidence_threshold instead"
        )
    half, _ = held_out.halves()
    common = _lowest(half, target, least)
    if common is None:
        raise SelectError(
            f"select.target_precision={target}: of {len(half)} validation images no confidence has labels that are so often right "
            "above it; ask for less, or for a better teacher"
        )
    thresholds = np.full(num_classes, common, np.float32)
    for index in range(num_classes) if by_class else ():
        rows = half.take(half.predicted == index)
        if len(rows) >= LEAST_IMAGES:
            own = _lowest(rows, target, least)
            thresholds[index] = UNREACHED if own is None else own
    return thresholds


def _lowest(rows: HeldOut, target: float, least: float) -> float | None:
    """The lowest threshold from `least` on at which a part `target` of the rows is right."""
    order = np.argsort(-rows.confidence, kind="stable")
    confidence = rows.confidence[order]
    right = np.cumsum(rows.label[order] == rows.predicted[order])
    is_last = np.append(confidence[:-1] > confidence[1:], [True] * min(len(confidence), 1))  # of equal confidences
    reaches = is_last & (right >= target * np.arange(1, len(right) + 1)) & (confidence >= np.float32(least))
    if not reaches.any():
        return None
    lowest = int(np.flatnonzero(reaches)[-1])
    rest = confidence[lowest + 1 :]
    return float(confidence[lowest]) if len(rest) and rest[0] >= np.float32(least) else least


def precision_json(
    held_out: HeldOut, thresholds: np.ndarray, target: float | None, least: float
) -> dict[str, Any] | None:
    """What the validation images say of a selection's thresholds: in all, and per class; None without any.

    With a target, counted on the half that the thresholds were not chosen on.

    Args:
        thresholds: float32 (C,).
        least: the thresholds' lower limit.
    """
    if not len(held_out):
        return None
    chosen_on, checked_on = held_out.halves() if target is not None else (None, held_out)
    total = checked_on.at(thresholds).as_json()
    classes = [
        {"class": index, "threshold": float(threshold)}
        | checked_on.take(checked_on.predicted == index).at(thresholds).as_json()
        for index, threshold in enumerate(thresholds)
    ]
    return {
        "target": target,
        "validation_images": len(held_out),
        "least_threshold": least,
        "chosen_on": None if chosen_on is None else chosen_on.at(thresholds).as_json(),
        "checked_on": total,
        "verdict": None if target is None else verdict(total, target),
        "classes": classes,
    }


def verdict(found: dict[str, Any], target: float) -> str:
    """What the check of a target says, in words."""
    if found["images"] < LEAST_IMAGES:
        return f"too few validation images to tell: {found['images']} at or above the threshold, where {LEAST_IMAGES} say something"
    if found["low"] >= target:
        return "confirmed"
    if found["high"] < target:
        return "missed: the validation images say less than was asked for"
    return "as asked for, as far as so many images can tell"
