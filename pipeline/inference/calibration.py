"""Temperature scaling, the expected calibration error and reliability bins."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

NUM_BINS = 15
MIN_IN_BIN = 10  # images; the accuracy of a smaller bin is mostly noise
_LOG_RANGE = (-3.0, 3.0)  # of the search: temperatures 0.05 to 20
_AT_BOUND = 0.001  # relative distance that counts as the end of the search


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimizes the cross-entropy of softmax(logits / T) (Guo et al., arXiv 1706.04599).

    The loss is unimodal in log T, so golden-section search finds the minimum.

    Args:
        logits: (N, C) float32 of held-out images.
        labels: (N,) int64.
    """
    scores, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(scores / np.exp(log_temperature), targets))

    low, high = _LOG_RANGE
    golden = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return round(float(np.exp((low + high) / 2)), 6)


def temperature_at_bound(temperature: float) -> str:
    """A warning, as a sentence, for a temperature at either end of the search; empty otherwise."""
    low, high = (float(np.exp(bound)) for bound in _LOG_RANGE)
    if temperature >= high * (1 - _AT_BOUND):
        return (
            f"the temperature {temperature:.3g} is the largest in the search: on the validation images, confidence says nothing about "
            "accuracy; wrong weights, classes or preprocessing?"
        )
    if temperature <= low * (1 + _AT_BOUND):
        return (
            f"the temperature {temperature:.3g} is the smallest in the search: nearly all validation images are right, and too few "
            "are wrong to calibrate with"
        )
    return ""


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature): (N, C) float32."""
    return F.softmax(torch.from_numpy(logits) / temperature, dim=1).numpy()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over 15 equal bins of confidence, a fraction.

    Args:
        probabilities: (N, C) float32.
        labels: (N,) int64.
    """
    # imported here: the import takes a second
    from torchmetrics.functional.classification import multiclass_calibration_error

    scores, targets = torch.from_numpy(probabilities), torch.from_numpy(labels)
    error = multiclass_calibration_error(scores, targets, num_classes=scores.shape[1], n_bins=NUM_BINS, norm="l1")
    return float(error)


def reliability_bins(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean confidence and accuracy of each bin with at least `MIN_IN_BIN` images; the bins are those of the calibration error.

    Args:
        confidence: (N,) float.
        right: (N,) bool.
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    enough = count >= MIN_IN_BIN
    sums = (np.bincount(bins, weights=values, minlength=NUM_BINS) for values in (confidence, right))
    means = [total[enough] / count[enough] for total in sums]
    return means[0], means[1]
