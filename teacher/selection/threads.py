"""Sharing shards out among threads: pyarrow and numpy release the GIL where the time goes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import numpy as np

_KEPT_BLOCK = 2**25 - 2**16  # bytes; never touched, so it costs none
Result = TypeVar("Result")
Progress = Callable[[str, int, int], None]  # what is being done, shards begun, shards in all


class Executor(Protocol):
    """`in_threads`, or what does the same elsewhere: runs a task several times, which share the shards out among them."""

    def __call__(
        self,
        task: Callable[[Iterable[str]], Result],
        shards: Sequence[str],
        num_workers: int,
        doing: str,
        progress: Progress | None = None,
    ) -> Iterable[Result]:
        """What `task` returns in each worker, in any order; raises what `task` raises."""


class _Shared:
    """One iterator over shards for several threads, which reports progress; `stop` ends it early for all."""

    def __init__(self, shards: Sequence[str], progress: Progress | None, doing: str) -> None:
        self._shards, self._lock, self._next = shards, threading.Lock(), 0
        self._progress, self._doing = progress, doing

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._lock:
            if self._next >= len(self._shards):
                raise StopIteration
            self._next += 1
            if self._progress:
                self._progress(self._doing, self._next, len(self._shards))
            return self._shards[self._next - 1]

    def stop(self) -> None:
        self._next = len(self._shards)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed arrays for the next ones, as glibc does of itself after the first block of 32 MB
    (mallopt(3), M_MMAP_THRESHOLD); else each batch's arrays are given back and fetched again, page by page, in a sixth of all time."""
    np.empty(_KEPT_BLOCK, np.uint8)


def in_threads(
    task: Callable[[Iterable[str]], Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: Progress | None = None,
) -> list[Result]:
    """What `task` returns in each of `num_workers` threads, which take shards from one queue.

    An error, or Ctrl-C, keeps all threads from taking another shard, and is raised.
    """
    keep_freed_memory()
    shared = _Shared(shards, progress, doing)
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            futures = [pool.submit(task, shared) for _ in range(num_workers)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            shared.stop()
    return [future.result() for future in futures]
