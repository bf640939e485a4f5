"""How a labeling worker divides its memory for images among files, decoding and batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from data.shards.read_ahead import MAX_AHEAD

_MIN_BATCHES = 2  # one is decoded while the model works on another
_MAX_BATCHES = 8  # more would only wait: see `batches.ahead`
_BATCHES, _FILES = (
    1 / 4,
    1 / 4,
)  # shares of the whole (files: also those read before their turn); what is left is for decoding
_MIN_BYTES = 1 << 24  # for files, and for decoding
_MAX_PIECE = 1 << 25  # bytes of files that are read in one go


class ByteBudget:
    """Bytes that several threads hold together. Whoever wants more waits until others give back.

    A request larger than the whole budget is granted when nobody holds anything, so that every file can be processed.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.peak = limit, 0
        self._held = 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    def take(self, number: int) -> None:
        """Wait for room, and hold `number` more bytes."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + number <= self.limit)
            self._held += number
            self.peak = max(self.peak, self._held)

    def give_back(self, number: int) -> None:
        """Hold `number` fewer bytes."""
        with self._changed:
            self._held -= number
            assert self._held >= 0, "more bytes given back than taken"
            self._changed.notify_all()

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Hold `number` bytes during the block."""
        self.take(number)
        try:
            yield
        finally:
            self.give_back(number)


@dataclass(frozen=True)
class ImageBudget:
    """Limits of a labeling worker's memory for images.

    Attributes:
        num_batches: of decoded images, for the model.
        files: for encoded images, read and not yet decoded.
        ahead_bytes: for encoded images of a remote shard that are read before their turn.
        decoding: for images while they are decoded and resized.
        total_bytes: of all together. One file or image larger than its limit is processed all the same, alone.
    """

    num_batches: int
    files: ByteBudget
    ahead_bytes: int
    decoding: ByteBudget
    total_bytes: int

    @classmethod
    def of(cls, memory_bytes: int, batch_bytes: int) -> Self:
        """Divide `memory_bytes`. Two batches, of `batch_bytes` each, and 32 MiB are taken in any case."""
        num_batches = min(_MAX_BATCHES, max(_MIN_BATCHES, int(_BATCHES * memory_bytes) // batch_bytes))
        files = max(_MIN_BYTES, int(_FILES * memory_bytes))
        decoding = max(_MIN_BYTES, memory_bytes - files - num_batches * batch_bytes)
        total, ahead = files + decoding + num_batches * batch_bytes, min(MAX_AHEAD, files // 4)
        return cls(num_batches, ByteBudget(files - ahead), ahead, ByteBudget(decoding), total)

    @property
    def piece_bytes(self) -> int:
        """Bytes of files to read in one go: several such pieces fit, so that reading goes on while others are decoded."""
        return min(_MAX_PIECE, self.files.limit // 8)
