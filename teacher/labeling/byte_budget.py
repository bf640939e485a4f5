"""Limit the bytes that threads hold at once, whatever the sizes of files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
