"""Training targets from labels and from the teacher's probabilities: few numbers an image until a batch is on the device.

label, or top-k probabilities ──► SparseTargets (shared memory, loading processes) ──► dense (N, C) on the device
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from data.labels.top_k import TopK, dense_probabilities
from pipeline.inputs.pixel_ops import upload

_BLOCK = 2**20  # dense values at a time when a loading process computes targets


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Targets of N images over `num_classes` classes: a few classes each, and one value for all others.

    Attributes:
        index: int32 (N, K), classes; a class may be repeated, with the same value.
        value: float32 (N, K), their targets.
        other: float32 (N,), the target of every other class.
    """

    index: np.ndarray
    value: np.ndarray
    other: np.ndarray
    num_classes: int

    def __len__(self) -> int:
        return len(self.other)

    def dense(self, device: str = "cpu") -> torch.Tensor:
        """float32 (N, C) on the device; rows sum to one."""
        parts = (torch.from_numpy(part) for part in (self.index, self.value, self.other))
        index, value, other = (upload(part, torch.device(device)) for part in parts)
        return other[:, None].repeat(1, self.num_classes).scatter_(1, index.long(), value)

    def take(self, positions: np.ndarray) -> SparseTargets:
        """The targets at these positions, int (M,)."""
        return SparseTargets(self.index[positions], self.value[positions], self.other[positions], self.num_classes)

    @staticmethod
    def concatenate(parts: Sequence[SparseTargets]) -> SparseTargets:
        """Join at least one part; K becomes the largest K."""
        width = max(part.index.shape[1] for part in parts)
        index, value = (
            np.concatenate([_widen(getattr(part, name), width) for part in parts]) for name in ("index", "value")
        )
        return SparseTargets(index, value, np.concatenate([part.other for part in parts]), parts[0].num_classes)


def _widen(columns: np.ndarray, width: int) -> np.ndarray:
    """Repeat the first column of (N, K) until there are `width`."""
    return np.concatenate([columns, np.repeat(columns[:, :1], width - columns.shape[1], axis=1)], axis=1)


def smoothed_targets(labels: np.ndarray, num_classes: int, smoothing: float) -> SparseTargets:
    """Label smoothing (arXiv 1512.00567, section 7): 1 − smoothing on the label, and smoothing / C on every class.

    Args:
        labels: int (N,).
    """
    hit, miss = torch.tensor([1.0, 0.0]).mul_(1 - smoothing).add_(smoothing / num_classes).numpy()
    shape = (len(labels), 1)
    return SparseTargets(
        labels.astype(np.int32).reshape(shape), np.full(shape, hit), np.full(len(labels), miss), num_classes
    )


def pseudo_label_targets(
    top_k: TopK, num_classes: int, kind: Literal["soft", "hard"], temperature: float
) -> SparseTargets:
    """`pseudo_targets` of label rows."""
    rows = max(1, _BLOCK // num_classes)
    starts = range(0, max(len(top_k.rest), 1), rows)
    blocks = [TopK(*(part[start : start + rows] for part in (top_k.index, top_k.prob, top_k.rest))) for start in starts]
    return SparseTargets.concatenate([_block_targets(block, num_classes, kind, temperature) for block in blocks])


def _block_targets(top_k: TopK, num_classes: int, kind: Literal["soft", "hard"], temperature: float) -> SparseTargets:
    """Computed densely: sums, and which of equal probabilities is the largest, depend on all classes."""
    dense = pseudo_targets(torch.from_numpy(dense_probabilities(top_k, num_classes)), kind, temperature).numpy()
    if kind == "hard":
        return smoothed_targets(dense.argmax(axis=1), num_classes, 0)
    index = top_k.index.astype(np.int64)
    other = np.take_along_axis(dense, _other_class(index, num_classes), axis=1)[:, 0]
    return SparseTargets(index.astype(np.int32), np.take_along_axis(dense, index, axis=1), other, num_classes)


def _other_class(index: np.ndarray, num_classes: int) -> np.ndarray:
    """A class outside each row's K, int64 (N, 1); any class where there is none."""
    outside = np.ones((len(index), num_classes), bool)
    np.put_along_axis(outside, index, False, axis=1)
    return outside.argmax(axis=1, keepdims=True)


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
