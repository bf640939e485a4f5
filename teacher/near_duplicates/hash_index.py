"""Which of many 64-bit hashes lie close to which of some others, without comparing all pairs.

Multi-index hashing (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012): hashes
are cut into 4 bands of 16 bits. Hashes that differ in at most 7 bits differ in at most one bit of some band, so a table of
the hashes under each of their bands, as it is and with each bit turned, has them all; beyond, it has many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teacher.selection.cutoffs import Int32, Int64, UInt64

COMPLETE_DISTANCE = 7
_BANDS, _BITS = 4, 16
_NEIGHBORS = np.array([0, *(1 << bit for bit in range(_BITS))], np.uint16)
_MAX_PAIRS = 2**16  # compared at once: half a megabyte an array, so that they stay in the cache
_MAX_QUERIES = 2**16


class Pairs(NamedTuple):
    """Hashes that are close: position among the queries (int64), in the index (int32), differing bits (uint8); all [n]."""

    query: Int64
    reference: Int32
    distance: NDArray[np.uint8]


class _Band(NamedTuple):
    hashes: UInt64  # each under its own value of the band and those one bit away: sorted by that
    positions: Int32  # where each was
    starts: Int32  # [2**16 + 1], of the hashes under a value


class HashIndex:
    """An index of hashes, uint64 [n]: 800 bytes of memory for each."""

    def __init__(self, hashes: UInt64) -> None:
        self._bands = [_make_band(hashes, number) for number in range(_BANDS)]

    def pairs(self, queries: UInt64, max_distance: int) -> Iterator[Pairs]:
        """Pairs of a query and an indexed hash that differ in at most `max_distance` bits, in small portions.

        All within 7 bits are found, and many of those beyond. A pair may come several times. Memory does not depend on
        how many there are.

        Args:
            queries: uint64 [m].
        """
        for begin in range(0, len(queries), _MAX_QUERIES):
            part = queries[begin : begin + _MAX_QUERIES]
            for number, band in enumerate(self._bands):
                value = _band_values(part, number)
                order = np.argsort(
                    value, kind="stable"
                )  # goes through the band's hashes once, from one end to the other
                for pairs in _compare(part[order], value[order], band, max_distance):
                    yield pairs._replace(query=order[pairs.query] + begin)


def _make_band(hashes: UInt64, number: int) -> _Band:
    value = (_band_values(hashes, number) ^ _NEIGHBORS[:, None]).ravel()
    order = np.argsort(value, kind="stable")
    starts = np.searchsorted(value[order], np.arange(2**_BITS + 1)).astype(np.int32)
    positions = (order % max(len(hashes), 1)).astype(np.int32)
    return _Band(hashes[positions], positions, starts)


def _band_values(hashes: UInt64, number: int) -> NDArray[np.uint16]:
    return (hashes >> np.uint64(_BITS * number)).astype(np.uint16)  # the lowest bits alone remain


def _compare(queries: UInt64, value: NDArray[np.uint16], band: _Band, max_distance: int) -> Iterator[Pairs]:
    """Queries with the hashes under their value of the band."""
    index = value.astype(np.int32)
    first = band.starts.take(index)
    count = band.starts.take(index + 1) - first
    ends = np.cumsum(count, dtype=np.int64)
    begin = 0
    while begin < len(queries) and ends[-1]:
        before = int(ends[begin - 1]) if begin else 0
        stop = max(int(np.searchsorted(ends, before + _MAX_PAIRS, "right")), begin + 1)
        counts = count[begin:stop]
        # a query's hashes lie at first, first + 1, …: its start less the pairs before it, plus the pair's number
        place = np.repeat(first[begin:stop] - (ends[begin:stop] - counts - before), counts)
        place += np.arange(len(place))
        bits = np.bitwise_count(np.repeat(queries[begin:stop], counts) ^ band.hashes.take(place))
        close = np.flatnonzero(bits <= max_distance)
        if len(close):
            query = np.searchsorted(ends, close + before, "right")
            yield Pairs(query, band.positions[place[close]], bits[close])
        begin = stop
