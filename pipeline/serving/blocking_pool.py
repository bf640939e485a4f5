"""What blocks runs in a few threads; what is made from much reading is made once and kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeVar

_SENDING, _MAKING, _SCANNING = 8, 4, 2  # threads
_SCANS_WAITING = 8  # for one of the two; further ones are told to come again
_Value = TypeVar("_Value")


class BusyError(Exception):
    """So much of the same kind is waiting already that this would only wait longer."""


class Work:
    """A bounded pool of threads; for one event loop.

    Args:
        waiting: calls of `submit` that may wait for a thread; None: any number.
    """

    def __init__(self, threads: int = _SENDING, waiting: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads, "serve")
        self._most = None if waiting is None else threads + waiting
        self._submitted = 0

    async def run(self, call: Callable[..., _Value], *arguments: Any) -> _Value:
        """`call(*arguments)`, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def later(self, call: Callable[[], None]) -> None:
        """As `run`, without waiting for it."""
        self._pool.submit(call)

    def submit(self, call: Callable[[], _Value]) -> tuple[Future[_Value], asyncio.Future[_Value]]:
        """As `run`, without waiting for it: the thread's future, and the event loop's. Raises BusyError."""
        if self._most is not None and self._submitted >= self._most:
            raise BusyError
        in_thread = self._pool.submit(call)
        in_loop = asyncio.wrap_future(in_thread)
        self._submitted += 1
        in_loop.add_done_callback(self._count_ended)
        return in_thread, in_loop

    def _count_ended(self, ended: object) -> None:  # noqa: ARG002 (a future's callback)
        self._submitted -= 1

    def close(self) -> None:
        """Wait for what runs; what has not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Workers:
    """Pools of one server, so that what takes long (reading all labels for a filter) does not hold up what does not."""

    sending: Work = field(default_factory=lambda: Work(_SENDING))
    making: Work = field(default_factory=lambda: Work(_MAKING))
    scanning: Work = field(default_factory=lambda: Work(_SCANNING, _SCANS_WAITING))

    def close(self) -> None:
        """As `Work.close`."""
        for work in (self.scanning, self.making, self.sending):
            work.close()


@dataclass
class _Made:
    """A value that is there or on its way, and how many wait for it."""

    in_thread: Future[Any]
    in_loop: asyncio.Future[Any]
    waiting: int = 0


class Kept:
    """Values by key, the last `most` that were asked for. Who asks while one is being made waits for it."""

    def __init__(self, work: Work, most: int) -> None:
        self._work, self._most = work, most
        self._made: OrderedDict[Hashable, _Made] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of `key`, made in a thread if it is not there.

        Raises:
            BusyError: too many others are waiting for theirs.
            what `make` raises, which is not kept.
        """
        made = self._made.get(key) or self._begin(key, make)
        self._made.move_to_end(key)
        made.waiting += 1
        try:
            return await asyncio.shield(made.in_loop)  # a client that goes does not take it from the others
        finally:
            made.waiting -= 1
            if not made.waiting and made.in_thread.cancel():  # nobody wants it, and it has not begun
                self._forget(key, made)

    def _begin(self, key: Hashable, make: Callable[[], Any]) -> _Made:
        made = self._made[key] = _Made(*self._work.submit(make))
        made.in_loop.add_done_callback(lambda done: self._forget_failed(key, made, done))
        ended = [other for other, entry in self._made.items() if entry.in_loop.done()]
        for other in ended[: max(0, len(self._made) - self._most)]:
            del self._made[other]
        return made

    def _forget_failed(self, key: Hashable, made: _Made, done: asyncio.Future[Any]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._forget(key, made)

    def _forget(self, key: Hashable, made: _Made) -> None:
        if self._made.get(key) is made:
            del self._made[key]


class Pieces:
    """An iterator that threads take turns with, and that may be closed while one of them is in it."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._lock = pieces, Lock()

    def next(self) -> bytes | None:
        """The next piece, or None at the end."""
        with self._lock:
            return next(self._pieces, None)

    def close(self) -> None:
        """End the iterator, and with it the files that it holds open."""
        with self._lock:
            if (close := getattr(self._pieces, "close", None)) is not None:
                close()
