"""Two models on the same images: how much better the second one is, and how much of that may be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same images."""

    difference: float  # of the top-1 accuracies, as a fraction
    error: float  # its standard error
    gained: int  # images that only the second has right
    lost: int  # images that only the first has right
    images: int


def paired(first: np.ndarray, second: np.ndarray) -> Comparison:
    """The second model's top-1 minus the first one's.

    The standard error is that of the mean of paired differences (−1, 0 or 1 per image), the one behind McNemar's test:
    images that both have right or wrong add no uncertainty.

    Args:
        first, second: (N,) bool: which images the model has right.
    """
    number = len(first)
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    difference = (gained - lost) / number
    error = math.sqrt(max((gained + lost) / number - difference**2, 0.0) / number)
    return Comparison(difference, error, gained, lost, number)
