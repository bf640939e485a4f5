"""What a selection is: a rule, and for each class the cut-off that turns a label row into a number of copies.

A row's rank within its class is (confidence, tie hash), higher first. Every row at or above the threshold gets its
class's `base_copies`, and one more when it ranks at or above the class's cut. A full class has base 0 and its cut at
the last row of the quota; a rare class has base `per_class // available`, and its cut shares out the remainder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]

MAX_CONFIDENCE = np.float32(1.00001)  # a float32 softmax may overshoot 1 by a few units in the last place
UNREACHED = 2.0  # a threshold that no confidence reaches
NO_CUT = 0xFFFFFFFF  # above the key of any confidence: nothing reaches it
_SIGN = np.uint32(0x7FFFFFFF)
_MAX_CLASSES = 1_000_000  # keeps label * bins within int32
_MAX_UINT16 = 65_535


class SelectError(ValueError):
    """A rule, label file or selection file that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class SelectRule:
    """What to keep (Noisy Student, section 3.2 of arXiv:1911.04252: 0.3, 130,000 per class, repeated up to there).

    Attributes:
        num_classes: labels are 0 … num_classes - 1.
        confidence_threshold: rows below it get no copies; compared as float32, as confidences are stored.
        per_class: images per class, repeats included; None keeps every row above the threshold once.
        max_copies: most copies of one image.
        class_thresholds: for each class, instead of `confidence_threshold`; `UNREACHED` keeps none of it; empty: the same for all.
    """

    num_classes: int
    confidence_threshold: float
    per_class: int | None
    max_copies: int
    class_thresholds: tuple[float, ...] = ()

    @property
    def thresholds(self) -> Float32:
        """Of every class, float32 [num_classes]."""
        return np.array(self.class_thresholds or [self.confidence_threshold] * self.num_classes, np.float32)

    def __post_init__(self) -> None:
        if self.class_thresholds and len(self.class_thresholds) != self.num_classes:
            raise SelectError(f"class_thresholds: expected {self.num_classes} but got {len(self.class_thresholds)}")
        for threshold in self.class_thresholds:
            _check_range("class_thresholds", threshold, 0, 1 if threshold != UNREACHED else UNREACHED)
        _check_range("num_classes", self.num_classes, 1, _MAX_CLASSES)
        _check_range("confidence_threshold", self.confidence_threshold, 0, 1)
        _check_range("max_copies", self.max_copies, 1, _MAX_UINT16)
        if self.per_class is not None:
            _check_range("per_class", self.per_class, 1, 2**62)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails too
        raise SelectError(f"select.{field} must be between {low} and {high} but got {value}")


@dataclass(frozen=True, eq=False)
class Cutoffs:
    """Per class, all of shape [num_classes]: enough to compute the copies of any label row.

    Attributes:
        available: int64, rows at or above the threshold that are not excluded.
        base_copies: uint16, copies of each of them.
        num_extra: int64, how many of them, from the top, get one copy more.
        cut_key: uint32, `confidence_key` of the last row that gets one more; NO_CUT when none does.
        cut_hash: uint64, the tie hash of that row.
    """

    available: Int64
    base_copies: UInt16
    num_extra: Int64
    cut_key: UInt32
    cut_hash: UInt64

    @property
    def kept(self) -> Int64:
        """Distinct images kept, int64 [num_classes]."""
        return np.where(self.base_copies > 0, self.available, self.num_extra)

    @property
    def copies(self) -> Int64:
        """Images kept, repeats included, int64 [num_classes]."""
        return self.base_copies * self.available + self.num_extra

    def copies_of(self, shard: str, label: Int32, key: UInt32, ordinal: Int32) -> UInt16:
        """Copies of rows that are at or above the threshold and not excluded, uint16 [n]; all inputs are [n]."""
        cut = self.cut_key.take(label)  # several times as fast as indexing
        extra = key > cut
        tied = np.flatnonzero(key == cut)
        extra[tied] = tie_hash(shard, ordinal[tied]) >= self.cut_hash[label[tied]]
        copies = self.base_copies.take(label)
        copies += extra
        return copies


def confidence_key(confidence: Float32) -> UInt32:
    """The bits of non-negative float32 values: integers in the same order, uint32, same shape."""
    return confidence.view(np.uint32) & _SIGN  # -0.0 and 0.0 are one value


def key_confidence(key: UInt32) -> Float32:
    """The inverse of `confidence_key`."""
    return key.view(np.float32)


def tie_hash(shard: str, ordinal: Int32) -> UInt64:
    """A fixed 64-bit hash of (shard name, ordinal), uint64 [n]; distinct within a shard.

    The shard's BLAKE2b XOR the ordinal, through SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014).
    Part of the selection's schema: another hash would select other images.
    """
    seed = np.uint64(int.from_bytes(hashlib.blake2b(shard.encode(), digest_size=8).digest(), "little"))
    mixed = ordinal.astype(np.uint64) ^ seed
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
