"""Run the tasks of a packing in processes of this machine, or in this process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar

from ..errors import DataError

Result = TypeVar("Result")
_ONE_BLAS_THREAD = "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"
"""Every process has a core; with a thread per core in each of them, the hashes take many times longer."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """Yield an executor of `number` processes; with 1, of this process alone. Processes end with this one, even by SIGKILL.

    When the block raises, as on Ctrl-C, tasks that have not begun are dropped and the others end first.

    Raises:
        DataError: a process was killed.
    """
    if number == 1:
        yield _InThisProcess()
        return
    with _environment(dict.fromkeys(_ONE_BLAS_THREAD, "1")):
        resource_tracker.ensure_running()  # starting it would unblock signals
        executor = _Processes(number, get_context("spawn"), _start_worker)
        try:
            yield executor
        except BrokenProcessPool:
            raise DataError(
                "a packing process was killed (out of memory?); the same command continues, with fewer of them by processes=N"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)


class _Processes(ProcessPoolExecutor):
    """Start processes, as tasks come, with SIGINT blocked: Ctrl-C reaches this process alone, also while they load modules."""

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return super().submit(function, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _InThisProcess(Executor):
    """Run each task when it is submitted."""

    def submit(self, function: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future = Future[Result]()
        future.set_result(function(*args, **kwargs))
        return future


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set these variables, unless they are set, for processes that start in the block."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _start_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    wait([parent.sentinel])
    os._exit(1)
