"""Top-1 and top-k accuracy: of one model against chance, and of two models on the same images. Imports no torch: `status` needs it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SIGNIFICANCE = 0.05  # level of the one-sided tests
_MIN_IMAGES = (
    30  # fewer cannot tell a fair model from chance: of 8 images in 8 classes, 4 must be right to be significant
)
_NAMED = 3  # classes in a message
_Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution
_BLOCK = 2**22  # scores sorted at a time


@dataclass(frozen=True, eq=False)
class Accuracy:
    """True and predicted labels of the same images: integers (N,), N ≥ 1."""

    labels: np.ndarray
    predicted: np.ndarray

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.labels)

    @property
    def right(self) -> int:
        """Number of right predictions."""
        return int((self.labels == self.predicted).sum())

    @property
    def top1(self) -> float:
        """A fraction."""
        return self.right / self.images

    @property
    def chance(self) -> float:
        """Expected top-1 of the same predictions in random order. For a model that always predicts one class: that class's share."""
        return _agreement(self.labels, self.predicted)

    @property
    def at_chance(self) -> bool:
        """True when top-1 is not significantly above chance (one-sided binomial test at 5 %).

        False below 30 images, and where even all predictions right would not be significant.
        """
        if self.images < _MIN_IMAGES:
            return False
        all_right = _tail(self.images, self.images, _agreement(self.labels, self.labels))
        return all_right <= _SIGNIFICANCE < _tail(self.right, self.images, self.chance)

    def better_than(self, other: Accuracy) -> bool:
        """True when top-1 is significantly above `other`'s on the same images (McNemar's test, one-sided, at 5 %)."""
        ours, theirs = self.labels == self.predicted, other.labels == other.predicted
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return gained > lost and _tail(gained, gained + lost, 0.5) <= _SIGNIFICANCE

    def describe(self, class_names: Sequence[str] | None = None) -> str:
        """Top-1, and the classes with the lowest accuracy."""
        text = f"top-1 {self.top1:.1%} ({self.right:,} of {self.images:,} validation images)"
        return f"{text}; least right: {', '.join(self._worst(class_names))}" if self.right < self.images else text

    def _worst(self, class_names: Sequence[str] | None) -> list[str]:
        count = np.bincount(self.labels)
        right = np.bincount(self.labels[self.labels == self.predicted], minlength=len(count))
        present = np.flatnonzero(count)
        worst = present[np.argsort(right[present] / count[present], kind="stable")][:_NAMED]
        names = [repr(class_names[label]) if class_names else f"class {label}" for label in worst]
        return [f"{name} {right[label]} of {count[label]}" for name, label in zip(names, worst, strict=True)]


def _agreement(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Probability that a randomly drawn label equals a randomly drawn prediction."""
    size = int(max(labels.max(), predicted.max())) + 1
    shares = [np.bincount(values, minlength=size) / len(values) for values in (labels, predicted)]
    return float(shares[0] @ shares[1])


def _tail(minimum: int, trials: int, probability: float) -> float:
    """Probability of `minimum` or more successes in `trials` binomial trials."""
    if minimum <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    successes = np.arange(minimum, trials + 1)
    ways = log_factorial[trials] - log_factorial[successes] - log_factorial[trials - successes]
    log_probabilities = ways + successes * np.log(probability) + (trials - successes) * np.log1p(-probability)
    return float(np.exp(log_probabilities).sum())


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> list[float]:
    """Fraction of rows of `scores` (N, C) whose label is among the k highest, for each k."""
    rows = max(1, _BLOCK // scores.shape[1])
    blocks = [slice(start, start + rows) for start in range(0, len(scores), rows)]
    ranked = np.concatenate([label_ranks(scores[block], labels[block], max(ks)) for block in blocks])
    return [share_within(ranked, k) for k in ks]


def label_ranks(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether the label of each row of `scores` (N, C) is its highest, second, … k-th score: bool (N, k), or (N, C) if C < k."""
    return np.asarray(np.argsort(-scores, axis=1, kind="stable")[:, :k] == labels[:, None])


def share_within(ranked: np.ndarray, k: int) -> float:
    """Fraction of the rows of `label_ranks` whose label is among the k highest."""
    return float(ranked[:, :k].any(axis=1).mean())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images."""

    difference: float  # second top-1 − first top-1, a fraction
    error: float  # standard error of the difference
    gained: int  # images that only the second model has right
    lost: int  # images that only the first model has right
    images: int

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference: Wald's with half an image added to each cell of the 2 × 2 table (Agresti and Min,
        Statistics in Medicine 2005), which holds where few images differ."""
        number, changed = self.images + 2, self.gained + self.lost + 1
        middle = (self.gained - self.lost) / number
        half = _Z95 * math.sqrt(changed - number * middle**2) / number
        return middle - half, middle + half


def paired_comparison(first: np.ndarray, second: np.ndarray) -> Comparison:
    """Compare two models by whether each has each image right: bool (N,).

    The standard error is that of the mean of paired differences (−1, 0 or 1 per image), as in McNemar's test: images that both
    models have right, or both wrong, add no uncertainty.
    """
    number = len(first)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    difference = (gained - lost) / number
    error = math.sqrt(max((gained + lost) / number - difference**2, 0.0) / number)
    return Comparison(difference, error, gained, lost, number)
