"""The order in which training sees images: a function of (seed, stream, epoch), computed from counts.

    shards × copies ── permuted per epoch ──► windows of several shards ── permuted inside ──► entry i

Copy c of an image is in pass c over its shard; passes are permuted like shards, which keeps copies of an image apart. A position is a
number: entry i belongs to epoch i // num_entries, and resuming there reads nothing. Ranks and loader workers take slices of the same
global order, so another world size continues it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

WINDOW_SHARDS = 16


@dataclass(frozen=True)
class OrderSlice:
    """Consecutive entries of an order: parallel int64 arrays."""

    epoch: np.ndarray
    shard: np.ndarray  # position of the shard in the stream's list
    row: np.ndarray  # row of the shard's table
    copy: np.ndarray  # 0 for the first copy of an image

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: slice | np.ndarray) -> OrderSlice:
        """Some of these entries: a slice, or positions (int)."""
        return OrderSlice(self.epoch[which], self.shard[which], self.row[which], self.copy[which])

    def tuples(self) -> Iterator[tuple[int, int, int, int]]:
        """Epoch, shard, row and copy of each entry."""
        return zip(*(part.tolist() for part in (self.epoch, self.shard, self.row, self.copy)), strict=True)


class Order:
    """The endless order of one stream. Holds about a byte for 5 rows: every loading process has one, of up to 130 million rows.

    Args:
        copies: for each shard, how often an epoch has each row: (num_rows,) unsigned int, 0 for never.
        seed: the run's seed.
        name: of the stream; another name gives another order.
        window_shards: passes over a shard (one per copy) whose samples are mixed; more mix better and keep more files open.

    Raises:
        ValueError: all copies are 0.
    """

    def __init__(self, copies: Iterable[np.ndarray], seed: int, name: str, window_shards: int = WINDOW_SHARDS) -> None:
        self._seed = (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        self._window = window_shards
        self._copies: list[_PackedColumn] = []
        passes = [np.empty((0, 3), np.int32)]
        for shard, column in enumerate(copies):
            self._copies.append(_PackedColumn(column))
            passes.append(_passes(shard, column))
        self._passes = np.concatenate(passes)
        if not len(self._passes):
            raise ValueError(f"the {name} stream has no images")
        self.num_entries = int(self._passes[:, 2].sum(dtype=np.int64))
        self._epoch_cache: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window_cache: tuple[tuple[int, int], np.ndarray] | None = None

    def take(self, start: int, count: int) -> OrderSlice:
        """Entries `start` to `start + count` of the endless order."""
        parts = []
        while count > 0:
            epoch, position = divmod(start, self.num_entries)
            passes, ends = self._epoch(epoch)
            window = int(np.searchsorted(ends, position, side="right"))
            begin = int(ends[window - 1]) if window else 0
            rows = self._permuted(epoch, window, passes)
            part = rows[position - begin : position - begin + count]
            parts.append(np.column_stack([np.full(len(part), epoch), part]))
            start, count = start + len(part), count - len(part)
        epoch_of, shard, row, copy = np.concatenate(parts).T if parts else np.empty((4, 0), np.int64)
        return OrderSlice(epoch_of, shard, row, copy)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permuted passes (N, 3), and the number of entries up to the end of each window."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            passes = self._passes[np.random.default_rng([*self._seed, epoch]).permutation(len(self._passes))]
            totals = np.cumsum(passes[:, 2], dtype=np.int64)
            last = np.minimum(np.arange(self._window, len(passes) + self._window, self._window), len(passes)) - 1
            self._epoch_cache = (epoch, passes, totals[last])
        return self._epoch_cache[1], self._epoch_cache[2]

    def _permuted(self, epoch: int, window: int, passes: np.ndarray) -> np.ndarray:
        """A window's permuted entries: (N, 3) shard, row, copy."""
        if self._window_cache is None or self._window_cache[0] != (epoch, window):
            chosen = passes[window * self._window : (window + 1) * self._window].tolist()
            rows = [(shard, copy, np.flatnonzero(self._copies[shard].column() > copy)) for shard, copy, _ in chosen]
            entries = np.concatenate([np.column_stack([np.full_like(r, s), r, np.full_like(r, c)]) for s, c, r in rows])
            generator = np.random.default_rng([*self._seed, epoch, window + 1])
            self._window_cache = ((epoch, window), entries[generator.permutation(len(entries))])
        return self._window_cache[1]


def _passes(shard: int, copies: np.ndarray) -> np.ndarray:
    """Passes over a shard, int32 (max copies, 3): shard, pass number c, rows with more than c copies."""
    sizes = np.bincount(copies)[:0:-1].cumsum()[::-1]
    return np.column_stack([np.full_like(sizes, shard), np.arange(len(sizes)), sizes]).astype(np.int32)


class _PackedColumn:
    """A column of copies, compressed: most are 0 or 1, and 130 million of them as uint16 take 260 MB."""

    def __init__(self, column: np.ndarray) -> None:
        narrow = column.astype(np.min_scalar_type(int(column.max(initial=0))))
        self._type, self._content = narrow.dtype, zlib.compress(narrow.tobytes(), 1)

    def column(self) -> np.ndarray:
        """The column, (num_rows,) of the narrowest unsigned type."""
        return np.frombuffer(zlib.decompress(self._content), self._type)
