"""How much the teacher disagrees with itself about an image, and which uncertain images differ from each other: arrays alone."""

from __future__ import annotations

import numpy as np


def disagreement(probabilities: np.ndarray) -> np.ndarray:
    """Mutual information between the prediction and the voter, in nats: the entropy of the mean − the mean entropy (Houlsby et al.,
    2011, arXiv 1112.5745, eq. 2).

    Args:
        probabilities: (V, N, C) of V voters: views, or views of several teachers.

    Returns:
        (N,) float64, from 0 (all agree) to log(min(V, C)).
    """
    found = _entropy(probabilities.mean(axis=0)) - _entropy(probabilities).mean(axis=0)
    return np.asarray(np.maximum(found, 0))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    values = probabilities.astype(np.float64)
    logarithms = np.log(values, out=np.zeros_like(values), where=values > 0)
    return np.asarray(-(values * logarithms).sum(axis=-1))


def choose_diverse(uncertainty: np.ndarray, features: np.ndarray, number: int) -> list[int]:
    """Choose rows one by one: the most uncertain first, then the highest uncertainty × distance to the nearest chosen one.

    The greedy rule of core-set selection (Sener and Savarese, 2018, arXiv 1708.00489, algorithm 1), weighted by uncertainty.

    Args:
        uncertainty: (N,), not negative.
        features: (N, F); only their directions count (distance 1 − cosine).

    Returns:
        At most `number` rows, in the order of the choice; of equal ones the first. Copies of chosen images come last.
    """
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    distance = np.ones(len(uncertainty))
    left = np.ones(len(uncertainty), bool)
    chosen: list[int] = []
    for _ in range(min(number, len(uncertainty))):
        at = int(np.argmax(np.where(left, uncertainty * distance, -1.0)))
        chosen.append(at)
        left[at] = False
        distance = np.minimum(distance, np.clip(1 - directions @ directions[at], 0, None))
    return chosen
