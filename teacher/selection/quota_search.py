"""The exact cut-off of every class at once, from mergeable histograms: a radix select over (confidence, tie hash).

Each class looks for its `rank`-th row from the top. A histogram tells the bin that row is in; the bin's interval is cut
into finer bins (down to one float32 value, then by the 64-bit tie hash) until the rows left fit in memory, and sorting
those ends the search. Memory is O(classes × bins) plus the rows allowed at the end. The cut-off is a row's own
(confidence, hash), so it depends on neither the bins nor the order of reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from teacher.selection.cutoffs import (
    MAX_CONFIDENCE,
    NO_CUT,
    Cutoffs,
    Float32,
    Int32,
    Int64,
    SelectError,
    SelectRule,
    UInt16,
    UInt32,
    UInt64,
    confidence_key,
)

# Classes × bins of one histogram: 2 MiB of int64 counters; 32 MiB miss the cache and take four times as long.
_MAX_CELLS = 2**18
_MAX_BINS, _MIN_BINS = 2**12, 2**6
_LAST_HASH = np.uint64(2**64 - 1)
_COUNTED_TOGETHER = 2**19  # cells: each counting fills a new histogram, and with few cells that takes longer


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows that may be cut-offs: label int32, key uint32 (`confidence_key`) and tie hash uint64, all [n]."""

    label: Int32
    key: UInt32
    hash: UInt64

    def take(self, rows: npt.NDArray[np.bool_]) -> Candidates:
        """The rows where the mask [n] is true."""
        return Candidates(self.label[rows], self.key[rows], self.hash[rows])

    @staticmethod
    def merge(parts: list[Candidates]) -> Candidates:
        """All rows of all parts."""
        return Candidates(
            np.concatenate([np.empty(0, np.int32), *(part.label for part in parts)]),
            np.concatenate([np.empty(0, np.uint32), *(part.key for part in parts)]),
            np.concatenate([np.empty(0, np.uint64), *(part.hash for part in parts)]),
        )


@dataclass(frozen=True, eq=False)
class Search:
    """Where each class's cut-off is: the `rank`-th row from the top of the `count` rows inside a closed interval.

    All arrays are [num_classes]. The interval is of keys and, once that is a single key, of tie hashes. Rank 0: the
    class needs no cut-off.
    """

    rank: Int64
    count: Int64
    key_low: UInt32
    key_last: UInt32
    hash_low: UInt64
    hash_last: UInt64

    @property
    def is_open(self) -> npt.NDArray[np.bool_]:
        """Classes whose cut-off is not known yet, bool [num_classes]."""
        return (self.rank > 0) & ((self.key_low < self.key_last) | (self.hash_low < self.hash_last))

    @property
    def num_candidates(self) -> int:
        """Rows that are still in question."""
        return int(self.count[self.is_open].sum())

    def key_limits(self) -> tuple[UInt32, UInt32]:
        """First and last key of the rows in question, uint32 [num_classes] each; (1, 0) for classes that have none."""
        is_open = self.is_open
        return np.where(is_open, self.key_low, np.uint32(1)), np.where(is_open, self.key_last, np.uint32(0))


def num_bins(num_classes: int) -> int:
    """Bins per class: a power of two, so that bin edges are exact float32 values, and fewer for more classes."""
    fitting = 1 << max((_MAX_CELLS // num_classes).bit_length() - 1, 0)
    return min(max(fitting, _MIN_BINS), _MAX_BINS)


def plan_copies(available: Int64, rule: SelectRule) -> tuple[UInt16, Int64]:
    """Base copies (uint16) and how many rows get one more (int64), from the rows available, all [num_classes].

    Copies within a class differ by at most one and add up to `per_class`, unless `max_copies` stops them.
    """
    if rule.per_class is None:
        return (available > 0).astype(np.uint16), np.zeros_like(available)
    base, extra = np.divmod(rule.per_class, np.maximum(available, 1))
    done = (available == 0) | (base >= rule.max_copies)
    base = np.where(available == 0, 0, np.minimum(base, rule.max_copies))
    return base.astype(np.uint16), np.where(done, 0, extra)


class Histogram:
    """Counts rows by class and bin.

    Cells are kept until there are many and then counted by `np.bincount`: other threads run meanwhile, as they cannot beside
    `np.add.at`, which holds the GIL.
    """

    def __init__(self, num_classes: int) -> None:
        self._counts = np.zeros((num_classes, num_bins(num_classes)), np.int64)
        self._cells: list[npt.NDArray[np.integer]] = []
        self._num_cells = 0

    def add_coarse(self, label: Int32, confidence: Float32, eligible: npt.NDArray[np.bool_]) -> None:
        """Count the eligible rows by label and equal steps of confidence; all [n]."""
        bins = self._counts.shape[1]
        cell = (confidence * np.float32(bins)).astype(np.int32)
        np.minimum(cell, bins - 1, out=cell)
        cell += label * np.int32(bins)
        beyond = np.int32(self._counts.size)  # taking the eligible ones out takes longer than counting the others too
        self._add(np.where(eligible, cell, beyond))

    def add_fine(self, rows: Candidates, search: Search) -> None:
        """Count rows by label and equal steps of their class's interval."""
        bins, label = self._counts.shape[1], rows.label
        key_shift, hash_shift = _shifts(search, bins)
        by_key = (rows.key - search.key_low[label]) >> key_shift[label]
        by_hash = (rows.hash - search.hash_low[label]) >> hash_shift[label]
        single_key = (search.key_low == search.key_last)[label]
        self._add(label.astype(np.int64) * bins + np.where(single_key, by_hash, by_key).astype(np.int64))

    def counts(self) -> Int64:
        """Rows so far, int64 [num_classes, bins]."""
        self._count()
        return self._counts

    def _add(self, cells: npt.NDArray[np.integer]) -> None:
        self._cells.append(cells)
        self._num_cells += len(cells)
        if self._num_cells >= _COUNTED_TOGETHER:
            self._count()

    def _count(self) -> None:
        if self._cells:
            cells, size = np.concatenate(self._cells, dtype=np.int64), self._counts.size
            self._counts += np.bincount(cells, minlength=size + 1)[:size].reshape(self._counts.shape)
        self._cells, self._num_cells = [], 0


def in_question(rows: Candidates, search: Search) -> Candidates:
    """The rows inside their class's interval of tie hashes; their keys are within `key_limits` already."""
    label = rows.label
    return rows.take((rows.hash >= search.hash_low[label]) & (rows.hash <= search.hash_last[label]))


def start(histogram: Int64, rank: Int64) -> Search:
    """The search after `Histogram.add_coarse` of all rows."""
    bins, num_classes = histogram.shape[1], len(rank)
    edges = confidence_key((np.arange(bins + 1) / bins).astype(np.float32))
    last_keys = edges[1:] - np.uint32(1)
    last_keys[-1] = confidence_key(np.array([MAX_CONFIDENCE]))[0]
    chosen, new_rank, count = _find_bins(histogram, rank)
    no_hash = np.zeros(num_classes, np.uint64)
    return Search(new_rank, count, edges[chosen], last_keys[chosen], no_hash, no_hash + _LAST_HASH)


def narrow(search: Search, histogram: Int64) -> Search:
    """The search after `Histogram.add_fine` of all rows in question."""
    key_shift, hash_shift = _shifts(search, histogram.shape[1])
    chosen, rank, count = _find_bins(histogram, search.rank)
    key_low = search.key_low + (chosen.astype(np.uint32) << key_shift)
    key_last = np.minimum(search.key_last, key_low + ((np.uint32(1) << key_shift) - np.uint32(1)))
    hash_low = search.hash_low + (chosen.astype(np.uint64) << hash_shift)
    hash_last = hash_low + ((np.uint64(1) << hash_shift) - np.uint64(1))
    by_key = search.is_open & (search.key_low < search.key_last)
    by_hash = search.is_open & ~by_key
    return Search(
        rank=np.where(search.is_open, rank, search.rank),
        count=np.where(search.is_open, count, search.count),
        key_low=np.where(by_key, key_low, search.key_low),
        key_last=np.where(by_key, key_last, search.key_last),
        hash_low=np.where(by_hash, hash_low, search.hash_low),
        hash_last=np.where(by_hash, hash_last, search.hash_last),
    )


def finish(search: Search, rows: Candidates, available: Int64, base_copies: UInt16, num_extra: Int64) -> Cutoffs:
    """The cut-offs, from all rows in question, in any order.

    Raises:
        SelectError: rows are missing or too many: the label files changed between two readings.
    """
    is_open = search.is_open
    found = np.bincount(rows.label, minlength=len(is_open))
    if not np.array_equal(found, np.where(is_open, search.count, 0)):
        raise SelectError("the label files changed while they were read; select again when nothing writes to them")
    cut_key = np.where(search.rank > 0, search.key_low, np.uint32(NO_CUT))
    cut_hash = np.where(search.rank > 0, search.hash_low, np.uint64(0))
    rank, ends = search.rank[is_open], np.cumsum(found)[is_open]
    # Label and key as one number are sorted in a fifth of the time of two columns.
    keys = np.sort(rows.label.astype(np.uint64) << np.uint64(32) | rows.key)
    cuts = keys[ends - rank]
    cut_key[is_open] = cuts & np.uint64(2**32 - 1)
    rank -= ends - np.searchsorted(keys, cuts, side="right")  # among the rows with the cut's key
    tied = rows.take(rows.key == cut_key[rows.label])
    ends = np.cumsum(np.bincount(tied.label, minlength=len(is_open)))[is_open]
    cut_hash[is_open] = tied.hash[np.lexsort((tied.hash, tied.label))[ends - rank]]
    return Cutoffs(available, base_copies, num_extra, cut_key, cut_hash)


def _find_bins(histogram: Int64, rank: Int64) -> tuple[Int64, Int64, Int64]:
    """Bin of each class's `rank`-th row from the top, the row's rank within the bin, rows in the bin; [num_classes]."""
    classes, bins = np.arange(len(rank)), histogram.shape[1]
    reversed_counts = histogram[:, ::-1]
    at_bin_or_above = np.cumsum(reversed_counts, axis=1)
    position = np.minimum((at_bin_or_above < rank[:, None]).sum(axis=1), bins - 1)
    count = reversed_counts[classes, position]
    return bins - 1 - position, rank - (at_bin_or_above[classes, position] - count), count


def _shifts(search: Search, bins: int) -> tuple[UInt32, UInt64]:
    """Bits to drop so that an interval falls into at most `bins` bins: of keys (uint32), of hashes (uint64)."""
    key_bits = [int(span).bit_length() for span in search.key_last - search.key_low]
    hash_bits = [int(span).bit_length() for span in search.hash_last - search.hash_low]
    index_bits = bins.bit_length() - 1
    key_shift = np.maximum(np.array(key_bits) - index_bits, 0).astype(np.uint32)
    return key_shift, np.maximum(np.array(hash_bits) - index_bits, 0).astype(np.uint64)
