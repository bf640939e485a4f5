"""Find pairs of close 64-bit hashes without comparing all pairs.

Multi-index hashing (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012): cut each hash
into 4 bands of 16 bits. Hashes that differ in at most 7 bits differ in at most one bit of some band. So a table that lists each hash
under its value of each band, and under the 16 values one bit away, finds all of these pairs, and many of the more distant ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
COMPLETE_DISTANCE = 7
_BANDS, _BITS = 4, 16
_NEIGHBORS = np.array([0, *(1 << bit for bit in range(_BITS))], np.uint16)  # XOR: the value itself, and one bit away
_MAX_PAIRS = 2**16  # to compare at once: arrays of half a megabyte stay in the cache
_MAX_QUERIES = 2**16


class Pairs(NamedTuple):
    """Close hashes, all [n]: positions among the queries, positions in the index, numbers of differing bits."""

    query: NDArray[np.int64]
    reference: NDArray[np.int32]
    distance: NDArray[np.uint8]


class _Band(NamedTuple):
    hashes: UInt64  # [17 n], each hash under 17 values of the band, sorted by value
    positions: NDArray[np.int32]  # [17 n], positions of these hashes in the index
    starts: NDArray[np.int32]  # [2**16 + 1], where the hashes of each value start


class HashIndex:
    """An index of hashes, uint64 [n]; takes 800 bytes per hash."""

    def __init__(self, hashes: UInt64) -> None:
        self._bands = [_make_band(hashes, number) for number in range(_BANDS)]

    def pairs(self, queries: UInt64, max_distance: int) -> Iterator[Pairs]:
        """Find pairs of a query and an indexed hash that differ in at most `max_distance` bits; yield them in small portions.

        Finds all pairs within 7 bits and many beyond. A pair may come several times. Memory does not grow with the number of pairs.

        Args:
            queries: uint64 [m].
        """
        for begin in range(0, len(queries), _MAX_QUERIES):
            part = queries[begin : begin + _MAX_QUERIES]
            for number, band in enumerate(self._bands):
                value = _band_values(part, number)
                order = np.argsort(value, kind="stable")  # reads the band's hashes in order
                for pairs in _compare(part[order], value[order], band, max_distance):
                    yield pairs._replace(query=order[pairs.query] + begin)


def _make_band(hashes: UInt64, number: int) -> _Band:
    value = (_band_values(hashes, number) ^ _NEIGHBORS[:, None]).ravel()
    order = np.argsort(value, kind="stable")
    starts = np.searchsorted(value[order], np.arange(2**_BITS + 1)).astype(np.int32)
    positions = (order % max(len(hashes), 1)).astype(np.int32)
    return _Band(hashes[positions], positions, starts)


def _band_values(hashes: UInt64, number: int) -> NDArray[np.uint16]:
    return (hashes >> np.uint64(_BITS * number)).astype(np.uint16)  # keeps the lowest 16 bits


def _compare(queries: UInt64, value: NDArray[np.uint16], band: _Band, max_distance: int) -> Iterator[Pairs]:
    """Compare queries with the hashes under their value of the band."""
    index = value.astype(np.int32)
    first = band.starts.take(index)
    count = band.starts.take(index + 1) - first
    ends = np.cumsum(count, dtype=np.int64)
    begin = 0
    while begin < len(queries) and ends[-1]:
        before = int(ends[begin - 1]) if begin else 0
        stop = max(int(np.searchsorted(ends, before + _MAX_PAIRS, "right")), begin + 1)
        counts = count[begin:stop]
        # a query's hashes are at first, first + 1, …: subtract the pairs before it, then add the pair's number
        place = np.repeat(first[begin:stop] - (ends[begin:stop] - counts - before), counts)
        place += np.arange(len(place))
        bits = np.bitwise_count(np.repeat(queries[begin:stop], counts) ^ band.hashes.take(place))
        close = np.flatnonzero(bits <= max_distance)
        if len(close):
            query = np.searchsorted(ends, close + before, "right")
            yield Pairs(query, band.positions[place[close]], bits[close])
        begin = stop
