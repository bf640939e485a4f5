"""How far confidences can be trusted: temperature scaling and the expected calibration error."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

NUM_BINS = 15
MIN_IN_BIN = 10  # with fewer images, a bin of a reliability diagram says nothing
_RANGE = (-3.0, 3.0)  # of the log-temperature: 0.05 to 20
_AT_BOUND = 0.001  # relative distance


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimizes the cross-entropy of softmax(logits / T) (Guo et al., arXiv 1706.04599).

    Args:
        logits: (N, C) float32 of held-out images.
        labels: (N,) int64.

    The loss is unimodal in log T; golden-section search finds its minimum without a learning rate to choose.
    """
    scores, targets = torch.from_numpy(logits).double(), torch.from_numpy(labels)

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(scores / np.exp(log_temperature), targets))

    low, high = _RANGE
    golden = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return round(float(np.exp((low + high) / 2)), 6)


def temperature_at_bound(temperature: float) -> str:
    """What a temperature at the end of the search says of the model, as a sentence; empty for others."""
    low, high = (float(np.exp(bound)) for bound in _RANGE)
    if temperature >= high * (1 - _AT_BOUND):
        return (
            f"the temperature {temperature:.3g} is the largest that is searched: its confidence says nothing of being right on the "
            "validation images; wrong weights, classes or preprocessing?"
        )
    if temperature <= low * (1 + _AT_BOUND):
        return (
            f"the temperature {temperature:.3g} is the smallest that is searched: nearly all validation images are right, too few "
            "wrong ones to calibrate with"
        )
    return ""


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(N, C) float32 probabilities of softmax(logits / temperature)."""
    return F.softmax(torch.from_numpy(logits) / temperature, dim=1).numpy()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error over 15 equal bins of confidence, as a fraction."""
    # only here: it takes a second to import, for which `stage=status` need not wait
    from torchmetrics.functional.classification import multiclass_calibration_error

    scores, targets = torch.from_numpy(probabilities), torch.from_numpy(labels)
    error = multiclass_calibration_error(scores, targets, num_classes=scores.shape[1], n_bins=NUM_BINS, norm="l1")
    return float(error)


def reliability_bins(
    confidence: np.ndarray, right: np.ndarray, least: int = MIN_IN_BIN
) -> tuple[np.ndarray, np.ndarray]:
    """Mean confidence and accuracy of the bins that hold enough images: equal bins, as the calibration error's (Guo et al., 2017).

    Args:
        confidence: (N,) float.
        right: (N,) bool.
        least: images of a bin.
    """
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    enough = count >= least
    sums = (np.bincount(bins, weights=values, minlength=NUM_BINS) for values in (confidence, right))
    means = [total[enough] / count[enough] for total in sums]
    return means[0], means[1]
