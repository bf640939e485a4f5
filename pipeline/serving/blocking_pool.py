"""Bounded thread pools for blocking calls, and caches of what they make."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Generic, TypeVar

_SENDING, _MAKING, _SCANNING = 8, 4, 2  # threads
_SCANS_WAITING = 8  # for one of the two threads; further scans raise BusyError
_Value = TypeVar("_Value")


class BusyError(Exception):
    """A pool's queue is full."""


class BlockingPool:
    """A pool of threads for one event loop.

    Args:
        max_waiting: calls of `submit` that may wait for a thread; None: no limit.
    """

    def __init__(self, threads: int = _SENDING, max_waiting: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, "serve")
        self._maximum = None if max_waiting is None else threads + max_waiting
        self._submitted = 0

    async def run(self, call: Callable[..., _Value], *arguments: Any) -> _Value:
        """Return `call(*arguments)`, run in a thread; never raises BusyError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def run_later(self, call: Callable[[], None]) -> None:
        """Run `call` in a thread, without waiting for it."""
        self._pool.submit(call)

    def submit(self, call: Callable[[], _Value]) -> tuple[Future[_Value], asyncio.Future[_Value]]:
        """Start `call` in a thread; return the thread's future and the event loop's. Raises BusyError."""
        if self._maximum is not None and self._submitted >= self._maximum:
            raise BusyError
        in_thread = self._pool.submit(call)
        in_loop = asyncio.wrap_future(in_thread)
        self._submitted += 1
        in_loop.add_done_callback(self._count_ended)
        return in_thread, in_loop

    def _count_ended(self, ended: object) -> None:  # noqa: ARG002 (a future's callback)
        self._submitted -= 1

    def close(self) -> None:
        """Wait for running calls; drop waiting ones."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Pools:
    """A server's pools, apart so that slow scans (all label files, for a new filter) do not delay sending."""

    sending: BlockingPool = field(default_factory=lambda: BlockingPool(_SENDING))
    making: BlockingPool = field(default_factory=lambda: BlockingPool(_MAKING))
    scanning: BlockingPool = field(default_factory=lambda: BlockingPool(_SCANNING, _SCANS_WAITING))

    def close(self) -> None:
        """Wait for running calls; drop waiting ones."""
        for pool in (self.scanning, self.making, self.sending):
            pool.close()


@dataclass
class _Entry:
    """A cached value, finished or being made, and the number of callers that await it."""

    in_thread: Future[Any]
    in_loop: asyncio.Future[Any]
    num_waiting: int = 0


class AsyncCache:
    """The `size` most recently used values, by key. Concurrent callers of a key share one computation."""

    def __init__(self, pool: BlockingPool, size: int) -> None:
        self._pool, self._size = pool, size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of `key`; if missing, run `make` in a thread.

        Raises:
            BusyError: the pool's queue is full.
            Whatever `make` raises; failures are not cached.
        """
        entry = self._entries.get(key) or self._start(key, make)
        self._entries.move_to_end(key)
        entry.num_waiting += 1
        try:
            return await asyncio.shield(entry.in_loop)  # a client that leaves must not cancel it for the others
        finally:
            entry.num_waiting -= 1
            if not entry.num_waiting and entry.in_thread.cancel():  # no caller left, and not started
                self._remove(key, entry)

    def _start(self, key: Hashable, make: Callable[[], Any]) -> _Entry:
        entry = self._entries[key] = _Entry(*self._pool.submit(make))
        entry.in_loop.add_done_callback(lambda done: self._remove_failed(key, entry, done))
        finished = [other for other, value in self._entries.items() if value.in_loop.done()]
        for other in finished[: max(0, len(self._entries) - self._size)]:
            del self._entries[other]
        return entry

    def _remove_failed(self, key: Hashable, entry: _Entry, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._remove(key, entry)

    def _remove(self, key: Hashable, entry: _Entry) -> None:
        if self._entries.get(key) is entry:
            del self._entries[key]


class LockedIterator(Generic[_Value]):
    """An iterator shared by threads; `close` is safe while another thread is in `next`."""

    def __init__(self, pieces: Iterator[_Value]) -> None:
        self._pieces, self._lock = pieces, Lock()

    def next(self) -> _Value | None:
        """Return the next piece, or None at the end."""
        with self._lock:
            return next(self._pieces, None)

    def close(self) -> None:
        """Close the iterator and the files it holds open."""
        with self._lock:
            if (close := getattr(self._pieces, "close", None)) is not None:
                close()
