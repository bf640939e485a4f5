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
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from subprocess import Popen
from typing import Any, TypeVar, cast

import numpy as np

MANY_SHARDS = 2_000  # from here on, processes save more than the half second of their start
_THREADS, _MAX_PROCESSES = 2, 8
_PARTS_PER_PROCESS = 4  # for progress, and so that a slow process gets fewer shards
_MAX_RAY_TASKS = 64  # each may return a histogram of some MB
_RETAINED_BLOCK = 2**25 - 2**16  # bytes; never touched, so it takes no memory
Result = TypeVar("Result")
Task = Callable[[Iterable[str]], Result]
ReportProgress = Callable[[str, int, int], None]  # what the task does, shards begun, shards in all


@dataclass(frozen=True)
class Executor:
    """Calls tasks in `num_workers` workers: `Threads`, `Processes` or `RayTasks`."""

    num_workers: int = 1
    progress: ReportProgress | None = None

    def __call__(self, task: Task[Result], shards: Sequence[str], doing: str) -> Iterable[Result]:
        """Return the result of `task` in each worker, in any order; raise what `task` raises."""
        raise NotImplementedError


@contextmanager
def threads_or_processes(
    num_shards: int, progress: ReportProgress | None = None, max_processes: int = _MAX_PROCESSES
) -> Iterator[Executor]:
    """Choose the faster executor for so many shards on this machine."""
    if num_shards < MANY_SHARDS:
        yield Threads(_THREADS, progress)
        return
    with processes(min(os.cpu_count() or 1, max_processes), progress) as executor:
        yield executor


class Threads(Executor):
    """Threads of this process, which take shards from one queue. After an error or Ctrl-C no thread takes another shard."""

    def __call__(self, task: Task[Result], shards: Sequence[str], doing: str) -> list[Result]:
        """See `Executor`."""
        retain_freed_memory()
        queue = _ShardQueue(shards, self.progress, doing)
        with ThreadPoolExecutor(self.num_workers) as pool:
            try:
                futures = [pool.submit(task, queue) for _ in range(self.num_workers)]
                wait_for_futures(futures, return_when=FIRST_EXCEPTION)
            finally:
                queue.stop()
        return [future.result() for future in futures]


ONE_THREAD = Threads()


def retain_freed_memory() -> None:
    """Raise glibc's mmap threshold to 32 MB by freeing one block of that size (mallopt(3), M_MMAP_THRESHOLD).

    The arrays of each batch then reuse memory; mapping them page by page each time takes a sixth of all time.
    """
    np.empty(_RETAINED_BLOCK, np.uint8)


def progress_bars(stage: str) -> ReportProgress:
    """Show a progress bar for each kind of work that takes more than five seconds."""
    from data.progress_bar import ProgressBar  # not in worker processes

    bars: dict[str, ProgressBar] = {}

    def update(doing: str, begun: int, total: int) -> None:
        if doing not in bars:
            bars[doing] = ProgressBar(total=total, desc=f"{stage}: {doing}", unit="shard", delayed=True)
        bar = bars[doing]
        bar.update(begun - bar.n)
        if begun == total:
            bar.close()

    return update


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
def processes(number: int, progress: ReportProgress | None = None) -> Iterator[Executor]:
    """Yield an executor of `number` processes. They end with the block, or when this process ends, even by SIGKILL.

    Tasks and results are pickled. After an error the executor cannot be used again.
    """
    with ExitStack() as stack:
        yield Processes(number, progress, tuple(stack.enter_context(_worker_process()) for _ in range(number)))


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


@dataclass(frozen=True)
class Processes(Executor):
    """Processes of this machine (see `processes`), which take a part of the shards at a time. A killed one raises OSError."""

    connections: tuple[Connection, ...] = ()

    def __call__(self, task: Task[Result], shards: Sequence[str], doing: str) -> Iterator[Result]:
        """See `Executor`. Yields a result for each part, as they end."""
        parts = iter(_split(shards, self.num_workers * _PARTS_PER_PROCESS))
        pending: dict[Connection, int] = {}
        done = 0

        def send_next_part(worker: Connection) -> None:
            part = next(parts, None)
            if part is not None:
                with _broken_pipe_as_os_error(doing):
                    worker.send((task, part))
                pending[worker] = len(part)

        for worker in self.connections:
            send_next_part(worker)
        while pending:
            for worker in cast(list[Connection], wait(list(pending))):
                with _broken_pipe_as_os_error(doing):
                    result, error = worker.recv()
                if error is not None:
                    raise error
                done += pending.pop(worker)
                send_next_part(worker)
                if self.progress:
                    self.progress(doing, done, len(shards))
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


class RayTasks(Executor):
    """Ray tasks of one CPU, each with a fixed part of the shards. When a node dies, Ray runs its task again on another."""

    def __call__(self, task: Task[Result], shards: Sequence[str], doing: str) -> Iterator[Result]:
        """See `Executor`. Yields the results as the tasks end."""
        import ray  # takes longer to import than most selections take; needed only on a cluster

        from pipeline.core.ray_runtime import as_finished

        call: Any = ray.remote(num_cpus=1)(lambda task, part: task(part))
        shared_task = ray.put(task)
        parts = _split(shards, min(self.num_workers, _MAX_RAY_TASKS))
        done = 0
        for part, result in as_finished((call.remote(shared_task, part), part) for part in parts):
            done += len(part)
            if self.progress:
                self.progress(doing, done, len(shards))
            yield result


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
