"""How right predictions are: top-1, mean per-class accuracy, and the interval of a mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, variance

import numpy as np

_QUANTILE = 1.96  # of the normal distribution: a 95 % interval


@dataclass(frozen=True)
class Score:
    """Test images of each class, and how many of them are predicted right."""

    right: tuple[int, ...]
    images: tuple[int, ...]

    @classmethod
    def of(cls, labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> Score:
        """Count by class; both (N,) int."""
        images = np.bincount(labels, minlength=num_classes)
        right = np.bincount(labels[labels == predicted], minlength=num_classes)
        return cls(tuple(right.tolist()), tuple(images.tolist()))

    @property
    def top1(self) -> float:
        """A fraction."""
        return sum(self.right) / sum(self.images)

    @property
    def mean_per_class(self) -> float:
        """Mean over the classes that have test images, of the fraction right."""
        return mean(right / images for right, images in zip(self.right, self.images, strict=True) if images)


def half_width(scores: Sequence[Score]) -> float:
    """Half the 95 % interval of the mean top-1 over seeds, a fraction.

    Two errors add up: of the test images, which all seeds share, and of the seeds. √(p(1−p)/N) with two right and two wrong images
    added (Agresti and Coull, 1998), so that it is not 0 where all are right; and the standard error of the mean over seeds.
    """
    images, right = sum(scores[0].images), mean(sum(score.right) for score in scores)
    share = (right + 2) / (images + 4)
    error = share * (1 - share) / (images + 4)
    if len(scores) > 1:
        error += variance(score.top1 for score in scores) / len(scores)
    return _QUANTILE * math.sqrt(error)
