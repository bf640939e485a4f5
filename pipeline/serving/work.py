"""What blocks runs in a few threads; what is made from much reading is made once and kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

_THREADS = 8
_Value = TypeVar("_Value")


class Work:
    """A bounded pool of threads; for one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "serve")

    async def run(self, call: Callable[..., _Value], *arguments: Any) -> _Value:
        """`call(*arguments)`, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)

    def later(self, call: Callable[[], None]) -> None:
        """As `run`, without waiting for it."""
        self._pool.submit(call)

    def close(self) -> None:
        """Wait for what runs; what has not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Kept:
    """Values by key, the last `most` that were asked for. Who asks while one is being made waits for it."""

    def __init__(self, work: Work, most: int) -> None:
        self._work, self._most = work, most
        self._made: OrderedDict[Hashable, asyncio.Future[Any]] = OrderedDict()

    async def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The value of `key`, made in a thread if it is not there. Raises what `make` raises, which is not kept."""
        future = self._made.get(key)
        if future is None:
            future = self._made[key] = asyncio.ensure_future(self._work.run(make))
            future.add_done_callback(lambda done: self._forget_failed(key, done))
            if len(self._made) > self._most:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return await asyncio.shield(future)  # a client that goes does not take it from the others

    def _forget_failed(self, key: Hashable, done: asyncio.Future[Any]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._made.get(key) is done:
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
