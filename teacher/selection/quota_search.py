"""Find the exact cut-off of every class at once: a radix select over (confidence, tie hash) with mergeable histograms.

1. Count the eligible rows by class and confidence bin. From the totals follows each class's `rank`: its cut-off is the
   `rank`-th row from the top (`plan_copies`).
2. The histogram tells which bin holds that row. While the rows of these bins exceed `max_candidates`, cut the bins into
   finer ones and count again: down to one float32 value, then by the 64-bit tie hash. Two readings usually suffice.
3. Collect the remaining rows and sort them.

Memory is O(classes × bins) plus the collected rows. The cut-off is a row's own (confidence, hash), so it depends on neither the bins
nor the order of reading. The results of several shards merge in any order, so any executor may split the shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from teacher.executors import ONE_THREAD, Executor
from teacher.selection.label_reader import LabelSource
from teacher.selection.rule import (
    MAX_CONFIDENCE,
    NO_CUT,
    Cutoffs,
    Float32,
    Int32,
    Int64,
    Mask,
    RankedRows,
    SelectError,
    SelectRule,
    UInt16,
    UInt32,
    UInt64,
    confidence_key,
    tie_hash,
)

MAX_CANDIDATES = 2_000_000  # rows to collect and sort: about 100 MB
_MAX_CELLS = 2**18  # classes × bins: 2 MiB of int64 counters stay in the cache; 32 MiB take four times as long
_MAX_BINS, _MIN_BINS = 2**12, 2**6
_LAST_HASH = np.uint64(2**64 - 1)
_COUNT_AFTER = 2**19  # rows per call of np.bincount, which allocates a histogram each time


@dataclass(frozen=True, eq=False)
class Selection:
    """Label files with their rule and exclusions, and the cut-offs that follow: enough to compute the copies of every label row."""

    source: LabelSource
    cutoffs: Cutoffs


def select_shards(
    source: LabelSource,
    shards: Sequence[str],
    executor: Executor = ONE_THREAD,
    max_candidates: int = MAX_CANDIDATES,
) -> Selection:
    """Find the exact cut-offs over all label files of `shards`: the same for any order, executor and memory limit.

    Args:
        shards: shard names, each once.
        max_candidates: rows to hold in memory; more of them take a further reading.

    Raises:
        SelectError: a shard is named twice, or a label file is missing or broken.
    """
    if twice := [shard for shard, count in Counter(shards).items() if count > 1]:
        raise SelectError(f"shard {twice[0]!r} is named twice; give every shard a name of its own")
    histogram = _sum(source, executor(partial(_count_rows, source), shards, "count"))
    available = histogram.sum(axis=1)
    base_copies, num_extra = plan_copies(available, source.rule)
    search = _start(histogram, num_extra)
    while search.num_candidates > max_candidates:
        finer = executor(partial(_count_finely, source, search), shards, "count finely")
        search = _narrow(search, _sum(source, finer))
    rows = RankedRows.merge(executor(partial(_collect, source, search), shards, "collect"), np.int32)
    return Selection(source, _finish(search, rows, available, base_copies, num_extra))


def plan_copies(available: Int64, rule: SelectRule) -> tuple[UInt16, Int64]:
    """Plan base copies (uint16) and the number of rows with one more (int64) from the eligible rows, all [num_classes].

    Copies within a class differ by at most one and add up to `per_class`, unless `max_copies` stops them.
    """
    if rule.per_class is None:
        return (available > 0).astype(np.uint16), np.zeros_like(available)
    base, extra = np.divmod(rule.per_class, np.maximum(available, 1))
    no_extra = (available == 0) | (base >= rule.max_copies)
    base = np.where(available == 0, 0, np.minimum(base, rule.max_copies))
    return base.astype(np.uint16), np.where(no_extra, 0, extra)


@dataclass(frozen=True, eq=False)
class _RankSearch:
    """Each class's cut-off is the `rank`-th row from the top of the `count` rows within a closed interval; rank 0: no cut-off.

    All arrays are [num_classes]. The interval is one of keys, and of tie hashes once it is down to a single key.
    """

    rank: Int64
    count: Int64
    key_low: UInt32
    key_last: UInt32
    hash_low: UInt64
    hash_last: UInt64

    @property
    def is_open(self) -> Mask:
        """Classes whose cut-off is not known yet, bool [num_classes]."""
        return (self.rank > 0) & ((self.key_low < self.key_last) | (self.hash_low < self.hash_last))

    @property
    def num_candidates(self) -> int:
        """Rows within the intervals of open classes."""
        return int(self.count[self.is_open].sum())

    def key_limits(self) -> tuple[UInt32, UInt32]:
        """First and last key of each interval, uint32 [num_classes] each; (1, 0), which is empty, for classes that are not open."""
        is_open = self.is_open
        return np.where(is_open, self.key_low, np.uint32(1)), np.where(is_open, self.key_last, np.uint32(0))


def _num_bins(num_classes: int) -> int:
    """Bins per class: fewer for more classes; a power of two, so that bin edges are exact float32 values."""
    fitting = 1 << max((_MAX_CELLS // num_classes).bit_length() - 1, 0)
    return min(max(fitting, _MIN_BINS), _MAX_BINS)


class _Histogram:
    """Count rows by class and bin.

    Collects the rows' cells and counts many at once with `np.bincount`, which releases the GIL; `np.add.at` holds it.
    """

    def __init__(self, num_classes: int) -> None:
        self._counts = np.zeros((num_classes, _num_bins(num_classes)), np.int64)
        self._cells: list[npt.NDArray[np.integer]] = []
        self._num_cells = 0

    def add_coarse(self, label: Int32, confidence: Float32, eligible: Mask) -> None:
        """Count the eligible rows by label and equal steps of confidence; all [n]."""
        bins = self._counts.shape[1]
        cell = (confidence * np.float32(bins)).astype(np.int32)
        np.minimum(cell, bins - 1, out=cell)
        cell += label * np.int32(bins)
        ignored = np.int32(
            self._counts.size
        )  # counting the other rows in an extra cell is faster than filtering them out
        self._add(np.where(eligible, cell, ignored))

    def add_fine(self, rows: RankedRows, search: _RankSearch) -> None:
        """Count rows by label and equal steps of their class's interval."""
        bins, label = self._counts.shape[1], rows.group
        key_shift, hash_shift = _shifts(search, bins)
        by_key = (rows.key - search.key_low[label]) >> key_shift[label]
        by_hash = (rows.tie - search.hash_low[label]) >> hash_shift[label]
        single_key = (search.key_low == search.key_last)[label]
        self._add(label.astype(np.int64) * bins + np.where(single_key, by_hash, by_key).astype(np.int64))

    def counts(self) -> Int64:
        """Counts of all rows so far, int64 [num_classes, bins]."""
        self._count()
        return self._counts

    def _add(self, cells: npt.NDArray[np.integer]) -> None:
        self._cells.append(cells)
        self._num_cells += len(cells)
        if self._num_cells >= _COUNT_AFTER:
            self._count()

    def _count(self) -> None:
        if self._cells:
            cells, size = np.concatenate(self._cells, dtype=np.int64), self._counts.size
            self._counts += np.bincount(cells, minlength=size + 1)[:size].reshape(self._counts.shape)
        self._cells, self._num_cells = [], 0


def _count_rows(source: LabelSource, shards: Iterable[str]) -> Int64:
    """Eligible rows by label and confidence, int64 [num_classes, bins]."""
    histogram = _Histogram(source.rule.num_classes)
    for _, batches in source.read_all(shards, needs_ordinals=False):
        for rows in batches:
            histogram.add_coarse(rows.label, rows.confidence, rows.eligible)
    return histogram.counts()


def _count_finely(source: LabelSource, search: _RankSearch, shards: Iterable[str]) -> Int64:
    """Rows within their class's interval by label and part of the interval, int64 [num_classes, bins]."""
    histogram = _Histogram(source.rule.num_classes)
    for rows in _within_interval(source, search, shards):
        histogram.add_fine(rows, search)
    return histogram.counts()


def _collect(source: LabelSource, search: _RankSearch, shards: Iterable[str]) -> RankedRows:
    return RankedRows.merge(_within_interval(source, search, shards), np.int32)


def _within_interval(source: LabelSource, search: _RankSearch, shards: Iterable[str]) -> Iterator[RankedRows]:
    """The eligible rows within their class's interval."""
    low, last = search.key_limits()
    for shard, batches in source.read_all(shards) if search.num_candidates else ():
        for rows in batches:
            label, key = rows.label, rows.key
            inside = np.flatnonzero((key >= low.take(label)) & (key <= last.take(label)) & rows.eligible)
            assert rows.ordinal is not None
            label, hashes = label[inside], tie_hash(shard, rows.ordinal[inside])
            candidates = RankedRows(label, key[inside], hashes)
            yield candidates.take((hashes >= search.hash_low[label]) & (hashes <= search.hash_last[label]))


def _sum(source: LabelSource, histograms: Iterable[Int64]) -> Int64:
    total = _Histogram(source.rule.num_classes).counts()  # zeros
    for histogram in histograms:  # as they arrive: a cluster's tasks return many
        total += histogram
    return total


def _start(histogram: Int64, rank: Int64) -> _RankSearch:
    """The search after `add_coarse` of all rows."""
    bins, num_classes = histogram.shape[1], len(rank)
    edges = confidence_key((np.arange(bins + 1) / bins).astype(np.float32))
    last_keys = edges[1:] - np.uint32(1)
    last_keys[-1] = confidence_key(np.array([MAX_CONFIDENCE]))[0]
    chosen, new_rank, count = _find_bins(histogram, rank)
    no_hash = np.zeros(num_classes, np.uint64)
    return _RankSearch(new_rank, count, edges[chosen], last_keys[chosen], no_hash, no_hash + _LAST_HASH)


def _narrow(search: _RankSearch, histogram: Int64) -> _RankSearch:
    """The search after `add_fine` of all rows within their intervals."""
    key_shift, hash_shift = _shifts(search, histogram.shape[1])
    chosen, rank, count = _find_bins(histogram, search.rank)
    key_low = search.key_low + (chosen.astype(np.uint32) << key_shift)
    key_last = np.minimum(search.key_last, key_low + ((np.uint32(1) << key_shift) - np.uint32(1)))
    hash_low = search.hash_low + (chosen.astype(np.uint64) << hash_shift)
    hash_last = hash_low + ((np.uint64(1) << hash_shift) - np.uint64(1))
    by_key = search.is_open & (search.key_low < search.key_last)
    by_hash = search.is_open & ~by_key
    return _RankSearch(
        rank=np.where(search.is_open, rank, search.rank),
        count=np.where(search.is_open, count, search.count),
        key_low=np.where(by_key, key_low, search.key_low),
        key_last=np.where(by_key, key_last, search.key_last),
        hash_low=np.where(by_hash, hash_low, search.hash_low),
        hash_last=np.where(by_hash, hash_last, search.hash_last),
    )


def _finish(search: _RankSearch, rows: RankedRows, available: Int64, base_copies: UInt16, num_extra: Int64) -> Cutoffs:
    """The cut-offs, from all rows within their intervals, in any order.

    Raises SelectError when the number of rows differs from the last histogram's: label files changed between two readings.
    """
    is_open = search.is_open
    found = np.bincount(rows.group, minlength=len(is_open))
    if not np.array_equal(found, np.where(is_open, search.count, 0)):
        raise SelectError("the label files changed while they were read; select again when nothing writes to them")
    cut_key = np.where(search.rank > 0, search.key_low, np.uint32(NO_CUT))
    cut_hash = np.where(search.rank > 0, search.hash_low, np.uint64(0))
    rank, ends = search.rank[is_open], np.cumsum(found)[is_open]
    # label and key as one number sort five times faster than as two columns
    keys = np.sort(rows.group.astype(np.uint64) << np.uint64(32) | rows.key)
    cuts = keys[ends - rank]
    cut_key[is_open] = cuts & np.uint64(2**32 - 1)
    rank -= ends - np.searchsorted(keys, cuts, side="right")  # among the rows with the cut's key
    tied = rows.take(rows.key == cut_key[rows.group])
    ends = np.cumsum(np.bincount(tied.group, minlength=len(is_open)))[is_open]
    cut_hash[is_open] = tied.tie[np.lexsort((tied.tie, tied.group))[ends - rank]]
    return Cutoffs(available, base_copies, num_extra, cut_key, cut_hash)


def _find_bins(histogram: Int64, rank: Int64) -> tuple[Int64, Int64, Int64]:
    """Bin of each class's `rank`-th row from the top, the row's rank within the bin, and the bin's rows; all [num_classes]."""
    classes, bins = np.arange(len(rank)), histogram.shape[1]
    reversed_counts = histogram[:, ::-1]
    at_bin_or_above = np.cumsum(reversed_counts, axis=1)
    position = np.minimum((at_bin_or_above < rank[:, None]).sum(axis=1), bins - 1)
    count = reversed_counts[classes, position]
    return bins - 1 - position, rank - (at_bin_or_above[classes, position] - count), count


def _shifts(search: _RankSearch, bins: int) -> tuple[UInt32, UInt64]:
    """Low bits to drop so that an interval has at most `bins` bins: of keys (uint32), of hashes (uint64); all [num_classes]."""
    key_bits = [int(span).bit_length() for span in search.key_last - search.key_low]
    hash_bits = [int(span).bit_length() for span in search.hash_last - search.hash_low]
    index_bits = bins.bit_length() - 1
    key_shift = np.maximum(np.array(key_bits) - index_bits, 0).astype(np.uint32)
    return key_shift, np.maximum(np.array(hash_bits) - index_bits, 0).astype(np.uint64)
