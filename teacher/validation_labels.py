"""Validation images as the teacher labels them, and the precision of these labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np

from data import storage
from data.labels.label_files import LABELS_OUTPUT_REMEDY, VALIDATION_NAME
from pipeline.core.committed_files import read_output_table
from pipeline.core.stage import done_record

_Z = 1.96  # standard deviations of a two-sided interval of 95 %


@dataclass(frozen=True, eq=False)
class ValidationLabels:
    """Validation images as the teacher labels them: true label int32, predicted label int32, confidence float32, all [n]."""

    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @staticmethod
    def read(folder: str) -> ValidationLabels:
        """Read `validation.parquet` of a labels folder; empty if the labels have none. Raises DataError if it is damaged."""
        columns = ["label", "predicted", "confidence"]
        if not storage.exists(storage.join(folder, VALIDATION_NAME)):  # labels of an earlier version
            return ValidationLabels(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
        table = read_output_table(folder, VALIDATION_NAME, done_record(folder), LABELS_OUTPUT_REMEDY, columns)
        return ValidationLabels(*(table.column(name).to_numpy() for name in columns))

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: np.ndarray) -> ValidationLabels:
        """The rows at these positions, or where a mask is true."""
        return ValidationLabels(self.label[rows], self.predicted[rows], self.confidence[rows])

    def halves(self) -> tuple[ValidationLabels, ValidationLabels]:
        """Split at random into two halves whose class counts differ by at most one; always the same two."""
        order = np.random.default_rng(0).permutation(len(self))
        order = order[np.argsort(self.label[order], kind="stable")]
        return self.take(np.sort(order[::2])), self.take(np.sort(order[1::2]))

    def at(self, thresholds: np.ndarray) -> Precision:
        """Precision of the labels at or above their class's threshold; thresholds float32 [num_classes]."""
        above = self.confidence >= thresholds[self.predicted]
        return Precision(int(above.sum()), int((above & (self.label == self.predicted)).sum()))


@dataclass(frozen=True)
class Precision:
    """Number of images with a label, and how many of the labels are right."""

    images: int
    right: int

    def as_json(self) -> dict[str, Any]:
        """Counts, precision and its 95 % interval after Wilson (JASA 1927, "Probable inference"); None without images."""
        if not self.images:
            return asdict(self) | {"precision": None, "low": None, "high": None}
        n, p = self.images, self.right / self.images
        centre = p + _Z**2 / (2 * n)
        half = _Z * sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        low, high = ((centre + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1))
        return asdict(self) | {"precision": p, "low": max(low, 0.0), "high": min(high, 1.0)}
