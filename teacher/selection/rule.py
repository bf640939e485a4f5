"""The selection rule, and the cut-offs that give each label row its number of copies.

A row's rank within its class is (confidence, tie hash), higher first. Every row at or above the threshold gets its
class's `base_copies`, and one more if it ranks at or above the class's cut-off. A class with more rows than its quota has
base 0 and its cut-off at the last row of the quota; a rare class has base `per_class // available`, and its cut-off
distributes the remainder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data.labels.top_k import MAX_CLASSES

Mask = npt.NDArray[np.bool_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]
UInt64 = npt.NDArray[np.uint64]
Float32 = npt.NDArray[np.float32]

MAX_CONFIDENCE = np.float32(1.00001)  # a float32 softmax may overshoot 1 by a few units in the last place
UNREACHED = 2.0  # a threshold above every confidence
NO_CUT = 0xFFFFFFFF  # a cut-off key above every confidence's key
_SIGN = np.uint32(0x7FFFFFFF)
_MAX_UINT16 = 65_535


class SelectError(ValueError):
    """A rule, label file or selection file cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class SelectRule:
    """Thresholds and quota (Noisy Student, section 3.2 of arXiv:1911.04252: 0.3; 130,000 per class, rare classes repeated).

    Attributes:
        num_classes: labels are 0 … num_classes - 1.
        confidence_threshold: rows below it get no copies; compared as float32, as confidences are stored.
        per_class: copies per class; None gives every row at or above the threshold one copy.
        max_copies: maximum copies of one image.
        class_thresholds: one threshold per class instead of `confidence_threshold`; `UNREACHED` excludes the class; empty: not used.
    """

    num_classes: int
    confidence_threshold: float
    per_class: int | None
    max_copies: int
    class_thresholds: tuple[float, ...] = ()

    @property
    def thresholds(self) -> Float32:
        """Threshold of each class, float32 [num_classes]."""
        return np.array(self.class_thresholds or [self.confidence_threshold] * self.num_classes, np.float32)

    def reaches_threshold(self, label: Int32, confidence: Float32) -> Mask:
        """Whether each row's confidence is at or above the threshold of its class, bool [n]; inputs are [n]."""
        if self.class_thresholds:
            return confidence >= self.thresholds.take(label)
        return confidence >= np.float32(self.confidence_threshold)  # no look-up per row in the usual case

    def __post_init__(self) -> None:
        if self.class_thresholds and len(self.class_thresholds) != self.num_classes:
            raise SelectError(f"class_thresholds: expected {self.num_classes} but got {len(self.class_thresholds)}")
        for threshold in self.class_thresholds:
            _check_range("class_thresholds", threshold, 0, 1 if threshold != UNREACHED else UNREACHED)
        _check_range("num_classes", self.num_classes, 1, MAX_CLASSES)
        _check_range("confidence_threshold", self.confidence_threshold, 0, 1)
        _check_range("max_copies", self.max_copies, 1, _MAX_UINT16)
        if self.per_class is not None:
            _check_range("per_class", self.per_class, 1, 2**62)


def _check_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails too
        raise SelectError(f"select.{field} must be between {low} and {high} but got {value}")


@dataclass(frozen=True, eq=False)
class Cutoffs:
    """Cut-offs by class, all [num_classes]: enough to compute the copies of any label row.

    Attributes:
        available: int64, eligible rows: at or above the threshold and not excluded.
        base_copies: uint16, copies of each eligible row.
        num_extra: int64, number of highest-ranking eligible rows that get one more copy.
        cut_key: uint32, `confidence_key` of the last row that gets one more; NO_CUT if none does.
        cut_hash: uint64, the tie hash of that row.
    """

    available: Int64
    base_copies: UInt16
    num_extra: Int64
    cut_key: UInt32
    cut_hash: UInt64

    @property
    def kept(self) -> Int64:
        """Images with copies, int64 [num_classes]."""
        return np.where(self.base_copies > 0, self.available, self.num_extra)

    @property
    def copies(self) -> Int64:
        """Copies in all, int64 [num_classes]."""
        return self.base_copies * self.available + self.num_extra

    def copies_of(self, shard: str, label: Int32, key: UInt32, ordinal: Int32) -> UInt16:
        """Copies of eligible rows, uint16 [n]; all inputs are [n]."""
        cut = self.cut_key.take(label)  # several times faster than indexing
        extra = key > cut
        tied = np.flatnonzero(key == cut)
        extra[tied] = tie_hash(shard, ordinal[tied]) >= self.cut_hash[label[tied]]
        copies = self.base_copies.take(label)
        copies += extra
        return copies


@dataclass(frozen=True, eq=False)
class HashGroups:
    """Perceptual hashes that more images have than `select.max_near_duplicates` allows, and the last image of each to keep.

    Rows with one hash rank like the rows of a class: by (confidence, tie hash), higher first.

    Attributes:
        hash: uint64 [n], the perceptual hashes, ascending.
        key: uint32 [n], `confidence_key` of the last row to keep.
        tie: uint64 [n], tie hash of that row.
    """

    hash: UInt64
    key: UInt32
    tie: UInt64

    def ranks_below(self, shard: str, image_hash: UInt64, key: UInt32, ordinal: Int32) -> Mask:
        """Rows of a shard that rank below the last row to keep of their hash, bool [n]; all inputs are [n]."""
        result = np.zeros(len(image_hash), bool)
        if not len(self.hash):
            return result
        place = np.minimum(np.searchsorted(self.hash, image_hash), len(self.hash) - 1)
        rows = np.flatnonzero(self.hash.take(place) == image_hash)
        cut = place[rows]
        tied = key[rows] == self.key[cut]
        result[rows] = (key[rows] < self.key[cut]) | (tied & (tie_hash(shard, ordinal[rows]) < self.tie[cut]))
        return result


class RankedRows(NamedTuple):
    """Rows of groups that are ranked by (confidence, tie hash); all [n].

    Attributes:
        group: a label, int32, or a perceptual hash, uint64.
        key: uint32, `confidence_key`.
        tie: uint64, `tie_hash`.
    """

    group: npt.NDArray[Any]
    key: UInt32
    tie: UInt64

    def take(self, rows: Int64 | Mask) -> RankedRows:
        """The rows at these positions, or where a mask is true."""
        return RankedRows(self.group[rows], self.key[rows], self.tie[rows])

    @staticmethod
    def merge(parts: Iterable[RankedRows], group: type[np.int32 | np.uint64]) -> RankedRows:
        """All rows; `group` is the type of their group, for when there are none."""
        none = RankedRows(np.empty(0, group), np.empty(0, np.uint32), np.empty(0, np.uint64))
        return RankedRows(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))


def confidence_key(confidence: Float32) -> UInt32:
    """Bits of non-negative float32 values, uint32 of the same shape: they sort as the values do."""
    return confidence.view(np.uint32) & _SIGN  # maps -0.0 to 0.0


def key_confidence(key: UInt32) -> Float32:
    """Invert `confidence_key`."""
    return key.view(np.float32)


def tie_hash(shard: str, ordinal: Int32) -> UInt64:
    """Hash (shard name, ordinal) to 64 bits, uint64 [n]; distinct within a shard.

    BLAKE2b of the shard name XOR the ordinal, then SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014).
    Part of the selection's schema: another hash would select other images.
    """
    seed = np.uint64(int.from_bytes(hashlib.blake2b(shard.encode(), digest_size=8).digest(), "little"))
    mixed = ordinal.astype(np.uint64) ^ seed
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
