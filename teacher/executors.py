"""Run a task over many shards: in threads, in processes of this machine, or in tasks of a Ray cluster.

A task is a function of an iterable of shard names. Every executor calls it in several workers, splits the shards among the calls,
and gives their results in any order; so results must merge in any order.

Threads: pyarrow and numpy release the GIL where the time goes. Processes: opening a Parquet file holds the GIL, which limits threads
when there are thousands of files.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from subprocess import Popen
from typing import Any, Protocol, TypeVar, cast

import numpy as np

MANY_SHARDS = 2_000  # from here on, processes save more than the half second of their start
_THREADS, _MAX_PROCESSES = 2, 8
_PARTS_PER_PROCESS = 4  # for progress, and so that a slow process gets fewer shards
_MAX_RAY_TASKS = 64  # each may return a histogram of some MB
_RETAINED_BLOCK = 2**25 - 2**16  # bytes; never touched, so it takes no memory
Result = TypeVar("Result")
Task = Callable[[Iterable[str]], Result]
ReportProgress = Callable[[str, int, int], None]  # what the task does, shards begun, shards in all


class Executor(Protocol):
    """`in_threads`, an executor of `processes`, or `in_ray_tasks`."""

    def __call__(
        self,
        task: Task[Result],
        shards: Sequence[str],
        num_workers: int,
        doing: str,
        progress: ReportProgress | None = None,
    ) -> Iterable[Result]:
        """Return the result of `task` in each worker, in any order; raise what `task` raises."""


@contextmanager
def threads_or_processes(num_shards: int, max_processes: int = _MAX_PROCESSES) -> Iterator[tuple[Executor, int]]:
    """Choose the faster executor for so many shards on this machine; yield it and its number of workers."""
    if num_shards < MANY_SHARDS:
        yield in_threads, _THREADS
        return
    number = min(os.cpu_count() or 1, max_processes)
    with processes(number) as executor:
        yield executor, number


def in_threads(
    task: Task[Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: ReportProgress | None = None,
) -> list[Result]:
    """Run `task` in `num_workers` threads, which take shards from one queue.

    After an error or Ctrl-C no thread takes another shard; the error is raised.
    """
    retain_freed_memory()
    queue = _ShardQueue(shards, progress, doing)
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            futures = [pool.submit(task, queue) for _ in range(num_workers)]
            wait_for_futures(futures, return_when=FIRST_EXCEPTION)
        finally:
            queue.stop()
    return [future.result() for future in futures]


def retain_freed_memory() -> None:
    """Raise glibc's mmap threshold to 32 MB by freeing one block of that size (mallopt(3), M_MMAP_THRESHOLD).

    The arrays of each batch then reuse memory; mapping them page by page each time takes a sixth of all time.
    """
    np.empty(_RETAINED_BLOCK, np.uint8)


class _ShardQueue:
    """An iterator over shards that several threads share; reports progress."""

    def __init__(self, shards: Sequence[str], progress: ReportProgress | None, doing: str) -> None:
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
        """End the iteration for all threads."""
        self._next = len(self._shards)


@contextmanager
def processes(number: int) -> Iterator[Executor]:
    """Yield an executor of up to `number` processes. They end with the block, or when this process ends, even by SIGKILL.

    Tasks and results are pickled. After an error the executor cannot be used again.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker_process()) for _ in range(number)]
        yield partial(_in_processes, workers)


@contextmanager
def _worker_process() -> Iterator[Connection]:
    # not multiprocessing.Process: that would import the command's main module first
    here, there = Pipe()
    command = [sys.executable, "-m", "teacher.executors", str(there.fileno())]
    # process_group=0: Ctrl-C reaches the parent alone
    with here, Popen(command, pass_fds=[there.fileno()], process_group=0) as process:
        there.close()
        try:
            yield here
        finally:
            process.kill()


def _in_processes(
    workers: Sequence[Connection],
    task: Task[Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: ReportProgress | None = None,
) -> Iterator[Result]:
    """Yield the result of `task` for each part of the shards, in the order in which they end. The task's own error is raised.

    Raises:
        OSError: a process was killed.
    """
    parts = iter(_split(shards, num_workers * _PARTS_PER_PROCESS))
    pending: dict[Connection, int] = {}
    done = 0

    def send_next_part(worker: Connection) -> None:
        part = next(parts, None)
        if part is not None:
            with _broken_pipe_as_os_error(doing):
                worker.send((task, part))
            pending[worker] = len(part)

    for worker in workers[:num_workers]:
        send_next_part(worker)
    while pending:
        for worker in cast(list[Connection], wait(list(pending))):
            with _broken_pipe_as_os_error(doing):
                result, error = worker.recv()
            if error is not None:
                raise error
            done += pending.pop(worker)
            send_next_part(worker)
            if progress:
                progress(doing, done, len(shards))
            yield result


def _split(shards: Sequence[str], max_parts: int) -> list[Sequence[str]]:
    number = min(max_parts, len(shards))
    return [shards[first::number] for first in range(number)]


@contextmanager
def _broken_pipe_as_os_error(doing: str) -> Iterator[None]:
    """Turn a broken pipe into an OSError. Wrap only send and receive: a task may raise the same errors itself."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise OSError(
            f"a worker process of this command was killed during {doing!r} (out of memory?); run the same command again"
        ) from None


def _serve(connection: Connection) -> None:
    """Run tasks from the parent process until it closes the connection or ends."""
    answer: tuple[Any, Exception | None]
    retain_freed_memory()
    with suppress(EOFError, ConnectionError):
        while True:
            task, shards = connection.recv()
            try:
                answer = task(shards), None
            except Exception as error:  # the parent raises it
                error.add_note(traceback.format_exc())
                answer = None, error
            connection.send(answer)


def in_ray_tasks(
    task: Task[Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: ReportProgress | None = None,
) -> Iterator[Result]:
    """Yield the result of `task` in each of up to `num_workers` Ray tasks of one CPU, as they end; each has a fixed part of the shards.

    When a node dies, Ray runs its task again on another. The task's own error is raised; the other tasks are not cancelled and end
    with this process at the latest: cancelling a task at the moment it ends crashes this process (Ray 2.60, "Tried to complete task
    that was not pending").
    """
    import ray  # takes longer to import than most selections take; needed only on a cluster
    from ray.exceptions import RayError

    from pipeline.core.ray_runtime import user_error

    call, shared_task = ray.remote(num_cpus=1)(_call), ray.put(task)
    parts = _split(shards, min(num_workers, _MAX_RAY_TASKS))
    pending: dict[ray.ObjectRef[Any], int] = {call.remote(shared_task, part): len(part) for part in parts}
    done = 0
    try:
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1, fetch_local=False)
            result = ray.get(ended)
            done += pending.pop(ended)
            if progress:
                progress(doing, done, len(shards))
            yield result
    except RayError as error:
        raise user_error(error) from None


def _call(task: Task[Any], shards: Sequence[str]) -> Any:
    return task(shards)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
