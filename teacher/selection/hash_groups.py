"""Crowds: more images with one perceptual hash than `select.max_near_duplicates` allows. The most confident stay.

A row's rank within its crowd is (confidence, tie hash), higher first, so that it depends on neither the order of reading nor
the number of workers. A crowd is told by the rank of the last row that stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher.selection.cutoffs import Int32, Int64, UInt32, UInt64, tie_hash


class Members(NamedTuple):
    """Rows of label files: perceptual hash uint64, key uint32 (`confidence_key`) and tie hash uint64, all [n]."""

    hash: UInt64
    key: UInt32
    tie: UInt64

    def take(self, rows: Int64) -> Members:
        """The rows at these positions."""
        return Members(self.hash[rows], self.key[rows], self.tie[rows])


@dataclass(frozen=True, eq=False)
class Crowds:
    """Cut-offs by perceptual hash, all [n]: `hash` uint64, ascending; `key` uint32 and `tie` uint64 of the last row that stays."""

    hash: UInt64
    key: UInt32
    tie: UInt64

    def beyond(self, shard: str, image_hash: UInt64, key: UInt32, ordinal: Int32) -> NDArray[np.bool_]:
        """Rows of a shard that rank below their crowd's cut-off, bool [n]; all inputs are [n]."""
        result = np.zeros(len(image_hash), bool)
        if not len(self.hash):
            return result
        place = np.minimum(np.searchsorted(self.hash, image_hash), len(self.hash) - 1)
        rows = np.flatnonzero(self.hash.take(place) == image_hash)
        cut = place[rows]
        tied = key[rows] == self.key[cut]
        result[rows] = (key[rows] < self.key[cut]) | (tied & (tie_hash(shard, ordinal[rows]) < self.tie[cut]))
        return result


def merge(parts: Sequence[Members]) -> Members:
    """All rows of all parts."""
    none = Members(np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint64))
    return Members(*(np.concatenate(columns) for columns in zip(none, *parts, strict=True)))


def strongest(members: Members, count: int) -> Members:
    """The `count` highest-ranking rows of each hash, ordered by hash and rank."""
    ordered = members.take(np.lexsort((~members.tie, ~members.key, members.hash)))
    return ordered.take(np.flatnonzero(_rank(ordered.hash) < count))


def cut_offs(members: Members, max_images: int) -> Crowds:
    """The crowds among rows that `strongest` gave, with at least `max_images` + 1 of each hash where there are so many."""
    beyond = np.flatnonzero(_rank(members.hash) == max_images)
    return Crowds(*members.take(beyond - 1))


def join(crowds: Sequence[Crowds]) -> Crowds:
    """Crowds of different hashes, together."""
    merged = merge([Members(part.hash, part.key, part.tie) for part in crowds])
    return Crowds(*merged.take(np.argsort(merged.hash)))


def _rank(ordered: UInt64) -> Int64:
    """Position of each row among those of its hash; equal hashes lie together."""
    positions = np.arange(len(ordered))
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0)) if len(ordered) else positions
