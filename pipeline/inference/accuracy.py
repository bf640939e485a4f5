"""How right a model is on the validation images, by class, and whether that is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ERROR = 0.05  # how often answers that have nothing to do with the images pass for better than chance
_NAMED = 3  # classes in a message


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Answers for validation images against their labels: integers (N,), N at least 1."""

    labels: np.ndarray
    predicted: np.ndarray

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def right(self) -> int:
        """For how many the answer is the label."""
        return int((self.labels == self.predicted).sum())

    @property
    def top1(self) -> float:
        """As a fraction."""
        return self.right / self.images

    @property
    def chance(self) -> float:
        """Top-1 to be expected of the same answers dealt out to the images at random; of always the same answer: that class's share."""
        return _agreement(self.labels, self.predicted)

    @property
    def at_chance(self) -> bool:
        """True when no more answers are right than dealing them out at random would have, up to its error: a one-sided binomial
        test at 5 %. False where so few images could not tell even if all answers were right.
        """
        best = _tail(self.images, self.images, _agreement(self.labels, self.labels))
        return best <= _ERROR < _tail(self.right, self.images, self.chance)

    def better_than(self, other: Accuracy) -> bool:
        """True when these answers are right for more of the same images than the other's, beyond error (McNemar's test, one-sided)."""
        ours, theirs = self.labels == self.predicted, other.labels == other.predicted
        gained, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return gained > lost and _tail(gained, gained + lost, 0.5) <= _ERROR

    def describe(self, class_names: Sequence[str] | None = None) -> str:
        """Top-1, and the classes whose images are least often right."""
        text = f"top-1 {self.top1:.1%} ({self.right:,} of {self.images:,} validation images)"
        return f"{text}; least right: {', '.join(self._worst(class_names))}" if self.right < self.images else text

    def _worst(self, class_names: Sequence[str] | None) -> list[str]:
        count = np.bincount(self.labels)
        right = np.bincount(self.labels[self.labels == self.predicted], minlength=len(count))
        there = np.flatnonzero(count)
        worst = there[np.argsort(right[there] / count[there], kind="stable")][:_NAMED]
        names = [repr(class_names[label]) if class_names else f"class {label}" for label in worst]
        return [f"{name} {right[label]} of {count[label]}" for name, label in zip(names, worst, strict=True)]


def _agreement(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Probability that a random label is a random answer."""
    size = int(max(labels.max(), predicted.max())) + 1
    shares = [np.bincount(values, minlength=size) / len(values) for values in (labels, predicted)]
    return float(shares[0] @ shares[1])


def _tail(least: int, trials: int, probability: float) -> float:
    """Probability of `least` or more successes in so many trials, each with `probability`."""
    if least <= 0 or probability >= 1:
        return 1.0
    if probability <= 0:
        return 0.0
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, trials + 1)))])
    hits = np.arange(least, trials + 1)
    ways = log_factorial[trials] - log_factorial[hits] - log_factorial[trials - hits]
    return float(np.exp(ways + hits * np.log(probability) + (trials - hits) * np.log1p(-probability)).sum())
