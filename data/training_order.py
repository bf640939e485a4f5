"""The order in which training sees images: a function of (seed, stream, epoch), computed from counts.

    shards × copies ── permuted per epoch ──► windows of several shards ── permuted inside ──► entry i

Copy c of an image is in pass c over its shard; passes are permuted like shards, which keeps copies of an image apart. A position is a
number: entry i belongs to epoch i // num_entries, and resuming there reads nothing. Ranks and loader workers take slices of the same
global order, so another world size continues it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


class Order:
    """The endless order of one stream.

    Args:
        copies: for each shard, how often an epoch has each row: (num_rows,) int, 0 for never.
        seed: the run's seed.
        name: of the stream; another name gives another order.
        window_shards: passes over a shard (one per copy) whose samples are mixed; more mix better and keep more files open.

    Raises:
        ValueError: all copies are 0.
    """

    def __init__(self, copies: Sequence[np.ndarray], seed: int, name: str, window_shards: int = WINDOW_SHARDS) -> None:
        self._copies = copies
        self._seed = (seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        self._window = window_shards
        passes = [(s, c, int((n > c).sum())) for s, n in enumerate(copies) for c in range(int(n.max(initial=0)))]
        if not passes:
            raise ValueError(f"the {name} stream has no images")
        self._passes = np.array(passes, np.int64)
        self.num_entries = int(self._passes[:, 2].sum())
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
            totals = np.cumsum(passes[:, 2])
            last = np.minimum(np.arange(self._window, len(passes) + self._window, self._window), len(passes)) - 1
            self._epoch_cache = (epoch, passes, totals[last])
        return self._epoch_cache[1], self._epoch_cache[2]

    def _permuted(self, epoch: int, window: int, passes: np.ndarray) -> np.ndarray:
        """A window's permuted entries: (N, 3) shard, row, copy."""
        if self._window_cache is None or self._window_cache[0] != (epoch, window):
            chosen = passes[window * self._window : (window + 1) * self._window]
            rows = [(shard, copy, np.flatnonzero(self._copies[shard] > copy)) for shard, copy, _ in chosen]
            entries = np.concatenate([np.column_stack([np.full_like(r, s), r, np.full_like(r, c)]) for s, c, r in rows])
            generator = np.random.default_rng([*self._seed, epoch, window + 1])
            self._window_cache = ((epoch, window), entries[generator.permutation(len(entries))])
        return self._window_cache[1]
