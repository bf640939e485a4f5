"""Temperature scaling, the expected calibration error and reliability bins."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

NUM_BINS = 15
MIN_IN_BIN = 10  # images; the accuracy of a smaller bin is mostly noise
_LOG_RANGE = (-3.0, 3.0)  # of the search: temperatures 0.05 to 20
_AT_BOUND = 0.001  # relative distance that counts as the end of the search
_SAMPLE = 2000  # images on which the search begins
_CHUNK = 1 << 22  # logits that are worked on at once
_MAX_STEPS, _MAX_PASSES = 12, 60  # of Newton's method; of all


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T that minimizes the cross-entropy of softmax(logits / T) (Guo et al., arXiv 1706.04599).

    The loss is convex in 1/T. Newton's method finds its minimum on a sample of the images, and from there on all of them, in two or
    three passes.

    Args:
        logits: (N, C) float32 of held-out images.
        labels: (N,) int64.
    """
    scores, targets = torch.from_numpy(logits), torch.from_numpy(labels)
    every = max(1, len(scores) // _SAMPLE)
    start = _minimum(scores[::every], targets[::every], 1.0, 1e-3)
    return round(1 / _minimum(scores, targets, start, 1e-6), 6)


def _minimum(scores: torch.Tensor, targets: torch.Tensor, start: float, tolerance: float) -> float:
    """The inverse temperature of the lowest loss, or an end of the search beyond which it would be lower.

    Newton's method within a shrinking bracket; a step that leaves the bracket, or no longer halves the slope, is a bisection instead.

    Args:
        start: where to begin.
        tolerance: relative size of the last step.
    """
    bounds = low, high = float(np.exp(_LOG_RANGE[0])), float(np.exp(_LOG_RANGE[1]))
    point, steepest = start, np.inf
    for number in range(_MAX_PASSES):
        slope, curvature = _derivatives(scores, targets, point)
        low, high = (point, high) if slope < 0 else (low, point)
        following = point - slope / curvature if curvature > 0 else np.inf
        if number > _MAX_STEPS or abs(slope) > steepest / 2 or not low < following < high:
            untried = [bound for bound in bounds if bound in (low, high) and bound != point]
            following = untried[0] if untried else float(np.sqrt(low * high))
        if low == high or abs(following / point - 1) < tolerance:
            return following if low < following < high else point
        point, steepest = following, abs(slope)
    return point


def _derivatives(scores: torch.Tensor, targets: torch.Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by the inverse temperature: the mean score under softmax(scores × inverse) less the
    right class's, and the variance of scores under it."""
    first = second = 0.0
    rows = max(1, _CHUNK // scores.shape[1])
    for part, answers in zip(scores.split(rows), targets.split(rows), strict=True):
        part = part.double()
        part -= part.amax(1, keepdim=True)
        right = part.gather(1, answers[:, None])[:, 0]
        weighted = torch.softmax(part * inverse, 1).mul_(part)
        mean = weighted.sum(1)
        first += float((mean - right).sum())
        second += float((weighted.mul_(part).sum(1) - mean.square()).sum())
    return first / len(scores), second / len(scores)


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


def confidences(logits: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """The highest of softmax(logits / temperature), float32 (N,), and whether it is the label's, bool (N,).

    Args:
        logits: float32 (N, C).
        labels: (N,) int64.
    """
    rows = max(1, _CHUNK // logits.shape[1])
    parts = (softmax(logits[start : start + rows], temperature) for start in range(0, len(logits), rows))
    highest, predicted = zip(*((part.max(axis=1), part.argmax(axis=1)) for part in parts), strict=True)
    return np.concatenate(highest), np.concatenate(predicted) == labels


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over 15 equal bins of confidence, a fraction.

    Args:
        confidence: of the predictions, float32 (N,).
        right: whether each is the label, bool (N,).
    """
    # imported here: the import takes a second
    from torchmetrics.functional.classification import binary_calibration_error

    scores = torch.from_numpy(confidence).clamp(max=1)  # it would take any above for logits
    error = binary_calibration_error(scores, torch.from_numpy(right).long(), NUM_BINS, "l1")
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
