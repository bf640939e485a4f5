"""Which label rows go into which shard of an export: a function of the selection alone, made piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.training_order import Order

_PIECE = 100_000  # rows looked at together


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one shard of the export, in order; int64 [n] each."""

    shard: np.ndarray  # position of the unlabeled shard
    row: np.ndarray  # of its labels
    number: np.ndarray  # which copy of the image; 0 for the first

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def concatenate(parts: Sequence[Part]) -> Part:
        """One after the other."""
        return Part(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("shard", "row", "number")))

    def slice(self, start: int, stop: int) -> Part:
        """Rows `start` to `stop`."""
        return Part(self.shard[start:stop], self.row[start:stop], self.number[start:stop])


def in_order(copies: Sequence[np.ndarray]) -> Iterator[Part]:
    """All rows as they lie, the copies of one after each other.

    Args:
        copies: per unlabeled shard, how often each of its rows is written, int [rows].
    """
    for position, counts in enumerate(copies):
        row = np.repeat(np.arange(len(counts)), counts)
        first = np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
        yield Part(np.full(len(row), position), row, np.arange(len(row)) - first)


def shuffled(copies: Sequence[np.ndarray], seed: int, shards: int) -> Iterator[Part]:
    """All rows in random order, mixed within `shards` unlabeled shards at a time, copies of one far apart (`data.training_order`)."""
    order = Order(copies, seed, "export", shards)
    for start in range(0, order.num_entries, _PIECE):
        entries = order.take(start, min(_PIECE, order.num_entries - start))
        yield Part(entries.shard, entries.row, entries.copy)


def cut(
    pieces: Iterable[Part], most: int, most_bytes: int | None, sizes: Callable[[Part], np.ndarray]
) -> Iterator[Part]:
    """The same rows in the same order, as parts of at most `most` rows and `most_bytes` bytes of images, but of one row at least.

    Args:
        sizes: bytes of the images of some rows, int [n]; asked only with `most_bytes`.
    """
    held: list[Part] = []
    for piece in pieces:
        rest = Part.concatenate([*held, piece])
        while (end := _end(rest, most, most_bytes, sizes)) < len(rest):
            yield rest.slice(0, end)
            rest = rest.slice(end, len(rest))
        held = [rest]
    if held and len(held[0]):
        yield held[0]


def _end(rows: Part, most: int, most_bytes: int | None, sizes: Callable[[Part], np.ndarray]) -> int:
    """Where the first part ends."""
    if most_bytes is None or len(rows) == 0:
        return min(most, len(rows))
    ends = np.cumsum(sizes(rows.slice(0, most)), dtype=np.int64)
    return min(most, max(1, int(np.searchsorted(ends, most_bytes, side="right"))))
