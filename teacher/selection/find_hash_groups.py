"""Finding crowds (`teacher.selection.hash_groups`) among many rows in little memory: count first, collect what may be too many.

Eight-bit counters by hash tell which rows can be in a crowd at all: a cell that counted no more than is allowed has none.
Only rows of the other cells are collected, cell by cell in as many readings as memory asks for, and only the
highest-ranking of each hash are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from teacher.selection.cutoffs import Int64, UInt64, tie_hash
from teacher.selection.hash_groups import Crowds, Members, cut_offs, join, merge, strongest
from teacher.selection.label_reader import LabelRows, LabelSource
from teacher.selection.threads import Progress, in_threads

COUNTER_BITS = 27  # 128 MiB of counters
MAX_ROWS = 8_000_000  # collected in one reading: about 400 MB with the sort
_FULL = 255  # where a counter stops
_MIX = np.uint64(
    0x9E3779B97F4A7C15
)  # spreads hashes, which have few bits that are anywhere near random, over the cells

Counters = NDArray[np.uint8]


def find_crowds(
    source: LabelSource,
    shards: Sequence[str],
    max_images: int,
    *,
    num_workers: int = 1,
    progress: Progress | None = None,
    counter_bits: int = COUNTER_BITS,
    max_rows: int = MAX_ROWS,
) -> Crowds:
    """Cut-offs of every hash that more than `max_images` eligible rows have: the same for any order and worker count.

    Args:
        source: label files and the exclusions whose rows take nobody's place; those have no crowds yet.
        max_images: at least 1.
        counter_bits: memory is 2 ** counter_bits bytes.
        max_rows: more rows that may be in a crowd cost further readings.

    Raises:
        SelectError: a label file is missing or broken.
    """
    counters, lock = np.zeros(2**counter_bits, np.uint8), threading.Lock()
    in_threads(partial(_count, source, counters, lock), shards, num_workers, "count copies", progress)
    counters *= counters > min(max_images, _FULL - 1)
    num_parts = max(1, -(-int(counters.sum(dtype=np.int64)) // max_rows))
    crowds = []
    for part in range(num_parts):
        task = partial(_collect, source, counters, (part, num_parts), max_images, max_rows // num_workers)
        collected = in_threads(task, shards, num_workers, "collect copies", progress)
        crowds.append(cut_offs(strongest(merge(collected), max_images + 1), max_images))
    return join(crowds)


def _count(source: LabelSource, counters: Counters, lock: threading.Lock, shards: Iterable[str]) -> None:
    for shard in shards:
        for rows in source.read(shard, needs_ordinals=False, needs_hashes=True):
            hashes, _ = _eligible(rows)
            cells, counts = np.unique(_cells(hashes, len(counters)), return_counts=True)
            with lock:
                counters[cells] = np.minimum(counters[cells] + counts, _FULL)


def _collect(
    source: LabelSource,
    counters: Counters,
    part: tuple[int, int],
    max_images: int,
    max_rows: int,
    shards: Iterable[str],
) -> Members:
    """The highest-ranking rows of each hash whose cell is one of the part's."""
    held, number, limit = [], 0, max_rows
    for shard in shards:
        for rows in source.read(shard, needs_hashes=True):
            held.append(_members(rows, shard, counters, part))
            number += len(held[-1].hash)
            if number > limit:
                held = [strongest(merge(held), max_images + 1)]
                number = len(held[0].hash)
                limit = max(max_rows, 2 * number)
    return strongest(merge(held), max_images + 1)


def _members(rows: LabelRows, shard: str, counters: Counters, part: tuple[int, int]) -> Members:
    hashes, positions = _eligible(rows)
    cells = _cells(hashes, len(counters))
    chosen = np.flatnonzero((counters.take(cells) > 0) & (cells % part[1] == part[0]))
    positions = positions[chosen]
    assert rows.ordinal is not None
    return Members(hashes[chosen], rows.key[positions], tie_hash(shard, rows.ordinal[positions]))


def _eligible(rows: LabelRows) -> tuple[UInt64, Int64]:
    """Hashes of the eligible rows, and where they are."""
    assert rows.image_hash is not None
    positions = np.flatnonzero(rows.eligible)
    return rows.image_hash.take(positions), positions


def _cells(hashes: UInt64, num_cells: int) -> Int64:
    bits = num_cells.bit_length() - 1
    return ((hashes * _MIX) >> np.uint64(64 - bits)).astype(np.int64)
