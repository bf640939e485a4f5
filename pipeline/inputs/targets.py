"""Dense targets from labels, and from the teacher's probabilities."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional


def smooth_one_hot(labels: torch.Tensor, num_classes: int, smoothing: float) -> torch.Tensor:
    """Label smoothing (arXiv 1512.00567, section 7): 1 − smoothing on the label, and smoothing / C on every class.

    Args:
        labels: int64 (N,).

    Returns:
        float32 (N, num_classes); rows sum to one.
    """
    return functional.one_hot(labels, num_classes).float().mul_(1 - smoothing).add_(smoothing / num_classes)


def pseudo_targets(
    probabilities: torch.Tensor, kind: Literal["soft", "hard"] = "soft", temperature: float = 1.0
) -> torch.Tensor:
    """The student's targets from the teacher's (calibrated) probabilities.

    `soft`: the probabilities at temperature 1; sharpened at lower ones (p ** (1 / temperature), made to sum to one).
    `hard`: one-hot on the most probable class.

    Args:
        probabilities: (N, C), float; rows sum to about one.

    Returns:
        float32 (N, C).
    """
    probabilities = probabilities.float()
    if kind == "hard":
        return functional.one_hot(probabilities.argmax(1), probabilities.shape[1]).float()
    if temperature == 1:
        return probabilities
    return (probabilities.log() / temperature).softmax(1)
