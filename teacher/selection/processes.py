"""Sharing shards out among processes of this machine: opening a Parquet file holds the GIL, so threads open no more than one does.

They are not `multiprocessing`'s, which begin by importing the command that was typed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from subprocess import Popen
from typing import Any, cast

from teacher.selection.threads import Executor, Progress, Result, in_threads, keep_freed_memory

_THREADS, _MAX_PROCESSES = 2, 8
MANY_SHARDS = 2_000  # from here on, processes save more than their start takes, half a second
_PARTS = 4  # per process: for the progress, and so that one that is slower gets fewer


@contextmanager
def threads_or_processes(num_shards: int, most: int = _MAX_PROCESSES) -> Iterator[tuple[Executor, int]]:
    """What shares so many shards out best on this machine, and among how many: `most` processes at most."""
    if num_shards < MANY_SHARDS:
        yield in_threads, _THREADS
        return
    number = min(os.cpu_count() or 1, most)
    with processes(number) as executor:
        yield executor, number


@contextmanager
def processes(number: int) -> Iterator[Executor]:
    """An executor (see threads.py) of up to `number` processes, which end with the block, and with this process however it ends.

    Tasks and results are pickled. After an error there is no further use.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker()) for _ in range(number)]
        yield partial(_in_processes, workers)


@contextmanager
def _worker() -> Iterator[Connection]:
    here, there = Pipe()
    command = [sys.executable, "-m", "teacher.selection.processes", str(there.fileno())]
    # a group of its own: Ctrl-C is for this process alone
    with here, Popen(command, pass_fds=[there.fileno()], process_group=0) as process:
        there.close()
        try:
            yield here
        finally:
            process.kill()


def _in_processes(
    workers: Sequence[Connection],
    task: Callable[[Iterable[str]], Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What `task` returns of each part of the shards, as they end. An error is raised as the task raised it.

    Raises:
        OSError: a process was killed.
    """
    num_parts = min(num_workers * _PARTS, len(shards))
    parts = iter([shards[first::num_parts] for first in range(num_parts)])
    pending: dict[Connection, int] = {}
    done = 0

    def give(worker: Connection) -> None:
        part = next(parts, None)
        if part is not None:
            with _told_of_its_loss(doing):
                worker.send((task, part))
            pending[worker] = len(part)

    for worker in workers[:num_workers]:
        give(worker)
    while pending:
        for worker in cast(list[Connection], wait(list(pending))):
            with _told_of_its_loss(doing):
                result, error = worker.recv()
            if error is not None:
                raise error
            done += pending.pop(worker)
            give(worker)
            if progress:
                progress(doing, done, len(shards))
            yield result


@contextmanager
def _told_of_its_loss(doing: str) -> Iterator[None]:
    """Around what is said to a process or heard of it alone: a task may raise the same errors."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise OSError(
            f"a process was lost as it was to {doing} (killed, or no memory was left); the same command does it again"
        ) from None


def _serve(connection: Connection) -> None:
    """Do the tasks that come, until nobody is there to send any or to hear of them."""
    answer: tuple[Any, Exception | None]
    keep_freed_memory()
    with suppress(EOFError, ConnectionError):
        while True:
            task, shards = connection.recv()
            try:
                answer = task(shards), None
            except Exception as error:  # raised where the task came from
                error.add_note(traceback.format_exc())
                answer = None, error
            connection.send(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
