"""The highest probabilities of images, as arrays: of a batch, of the rows of a label file, and spread over all classes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

MAX_CLASSES = 32_767  # `topk_index` is int16
LAST_CLASS = 0xFFFF


@dataclass(frozen=True, eq=False)
class TopK:
    """The highest probabilities of N images: `index` int (N, K) and `prob` float (N, K), highest first; `rest` float32 (N,)."""

    index: np.ndarray
    prob: np.ndarray
    rest: np.ndarray

    @classmethod
    def of(cls, index: np.ndarray, prob: np.ndarray) -> TopK:
        """The top k with the `rest` that follows from them."""
        return cls(index, prob, np.clip(1.0 - prob.sum(axis=1, dtype=np.float64), 0, 1).astype(np.float32))

    @staticmethod
    def concatenate(parts: Sequence[TopK], top_k: int) -> TopK:
        """Join `parts`; `top_k` is K, for when there are none."""
        none = TopK(np.empty((0, top_k), np.int64), np.empty((0, top_k), np.float32), np.empty(0, np.float32))
        parts = [none, *parts]
        return TopK(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "prob", "rest")))


def top_k_of(probabilities: np.ndarray, top_k: int) -> TopK:
    """The `top_k` highest probabilities of each row; of equal ones, the lower class first.

    Args:
        probabilities: (N, C) float32, calibrated, non-negative; rows sum to 1.
        top_k: at most C.
    """
    # Sort one integer per entry, probability bits above the class: the order is unique, and argsort takes eight times as long.
    bits = np.ascontiguousarray(probabilities).view(np.int32).astype(np.int64)
    keys = np.negative((bits << 16) | (LAST_CLASS - np.arange(bits.shape[1])))
    top = np.sort(np.partition(keys, top_k - 1, axis=1)[:, :top_k], axis=1)
    index = LAST_CLASS - (np.negative(top) & LAST_CLASS)
    return TopK.of(index, np.take_along_axis(probabilities, index, axis=1))


def top_k_columns(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """`topk_index` int16 (N, K) and `topk_prob` float16 (N, K) of label rows."""
    columns = (table.column(name).combine_chunks() for name in ("topk_index", "topk_prob"))
    index, prob = (column.flatten().to_numpy().reshape(-1, column.type.list_size) for column in columns)
    return index, prob


def stored_top_k(table: pa.Table) -> TopK:
    """The probabilities of label rows as they are stored: int16 indexes, float16 probabilities."""
    return TopK(*top_k_columns(table), table.column("rest").to_numpy())


def dense_probabilities(top_k: TopK, num_classes: int) -> np.ndarray:
    """Class probabilities, (N, C) float32, rows sum to one. `rest` is spread evenly over the classes outside the top k."""
    others = num_classes - top_k.index.shape[1]
    rest = top_k.rest / others if others > 0 else np.zeros(len(top_k.rest), np.float32)
    targets = np.repeat(rest[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(targets, top_k.index.astype(np.int64), top_k.prob.astype(np.float32), axis=1)
    return np.asarray(targets / targets.sum(axis=1, keepdims=True), np.float32)
