"""Find groups of more images with one perceptual hash than `select.max_near_duplicates` allows, in little memory.

1. Count rows by hash in a table of 8-bit counters. A cell that counts no more rows than allowed holds no such group.
2. Collect the rows of the other cells, in as many readings as memory asks for, and keep the highest-ranking of each hash.
3. The last row to keep of each group is its cut-off (`HashGroups`).

Ranks depend on confidence and tie hash alone, so neither the order of reading nor the number of workers changes the result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from teacher.executors import ONE_THREAD, Threads
from teacher.selection.label_reader import LabelRows, LabelSource
from teacher.selection.rule import HashGroups, Int64, RankedRows, UInt64, tie_hash

COUNTER_BITS = 27  # 128 MiB of counters
MAX_ROWS = 8_000_000  # collected in one reading: about 400 MB with the sort
_FULL = 255  # a counter's maximum
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # distributes perceptual hashes, whose bits are far from random, over the cells


@dataclass(frozen=True, eq=False)
class _Reading:
    """What one reading collects: rows whose cell's counter is not 0 and whose cell modulo `num_parts` is `part`."""

    source: LabelSource
    counters: NDArray[np.uint8]
    part: int
    num_parts: int
    rows_per_hash: int
    max_rows: int


def find_hash_groups(
    source: LabelSource,
    shards: Sequence[str],
    max_images: int,
    *,
    threads: Threads = ONE_THREAD,
    counter_bits: int = COUNTER_BITS,
    max_rows: int = MAX_ROWS,
) -> HashGroups:
    """Cut-offs of every hash that more than `max_images` eligible rows have: the same for any order and worker count.

    Args:
        source: label files, and exclusions without hash groups.
        max_images: at least 1.
        counter_bits: the counters take 2 ** counter_bits bytes.
        max_rows: rows to collect in one reading; more of them take further readings.

    Raises:
        SelectError: a label file is missing or broken.
    """
    counters, lock = np.zeros(2**counter_bits, np.uint8), threading.Lock()
    threads(partial(_count, source, counters, lock), shards, "count copies")
    counters *= counters > min(max_images, _FULL - 1)
    num_parts = max(1, -(-int(counters.sum(dtype=np.int64)) // max_rows))
    found = []
    for part in range(num_parts):
        reading = _Reading(source, counters, part, num_parts, max_images + 1, max_rows // threads.num_workers)
        collected = threads(partial(_collect, reading), shards, "collect copies")
        members = _highest(RankedRows.merge(collected, np.uint64), max_images + 1)
        first_beyond = np.flatnonzero(_rank(members.group) == max_images)
        found.append(members.take(first_beyond - 1))
    groups = RankedRows.merge(found, np.uint64)
    return HashGroups(*groups.take(np.argsort(groups.group)))


def _count(source: LabelSource, counters: NDArray[np.uint8], lock: threading.Lock, shards: Iterable[str]) -> None:
    for _, batches in source.read_all(shards, needs_ordinals=False, needs_hashes=True):
        for rows in batches:
            hashes, _ = _eligible(rows)
            cells, counts = np.unique(_cells(hashes, len(counters)), return_counts=True)
            with lock:
                counters[cells] = np.minimum(counters[cells] + counts, _FULL)


def _collect(reading: _Reading, shards: Iterable[str]) -> RankedRows:
    """The highest-ranking rows of each hash."""
    held, number, limit = [], 0, reading.max_rows
    for shard, batches in reading.source.read_all(shards, needs_hashes=True):
        for rows in batches:
            held.append(_members(reading, rows, shard))
            number += len(held[-1].group)
            if number > limit:
                held = [_highest(RankedRows.merge(held, np.uint64), reading.rows_per_hash)]
                number = len(held[0].group)
                limit = max(reading.max_rows, 2 * number)
    return _highest(RankedRows.merge(held, np.uint64), reading.rows_per_hash)


def _members(reading: _Reading, rows: LabelRows, shard: str) -> RankedRows:
    hashes, positions = _eligible(rows)
    cells = _cells(hashes, len(reading.counters))
    chosen = np.flatnonzero((reading.counters.take(cells) > 0) & (cells % reading.num_parts == reading.part))
    positions = positions[chosen]
    assert rows.ordinal is not None
    return RankedRows(hashes[chosen], rows.key[positions], tie_hash(shard, rows.ordinal[positions]))


def _eligible(rows: LabelRows) -> tuple[UInt64, Int64]:
    """Hashes of the eligible rows, and their positions."""
    assert rows.image_hash is not None
    positions = np.flatnonzero(rows.eligible)
    return rows.image_hash.take(positions), positions


def _cells(hashes: UInt64, num_cells: int) -> Int64:
    bits = num_cells.bit_length() - 1
    return ((hashes * _SPREAD) >> np.uint64(64 - bits)).astype(np.int64)


def _highest(members: RankedRows, count: int) -> RankedRows:
    """The `count` highest-ranking rows of each hash, ordered by hash and rank."""
    ordered = members.take(np.lexsort((~members.tie, ~members.key, members.group)))
    return ordered.take(np.flatnonzero(_rank(ordered.group) < count))


def _rank(ordered: UInt64) -> Int64:
    """Position of each row among the rows of its hash, from 0; equal hashes are adjacent."""
    positions = np.arange(len(ordered))
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return positions - np.maximum.accumulate(np.where(is_first, positions, 0)) if len(ordered) else positions
