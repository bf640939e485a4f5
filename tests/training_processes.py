"""Training in processes of its own, which can be killed: one, or several that form a group as under Ray Train, without Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from data.storage.failpoint import VARIABLE
from pipeline.core import interrupt
from pipeline.core.schema import TrainConfig
from pipeline.inputs.streams import StreamSpec
from pipeline.training import loop
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from tests import HANGS_S

# Forked from a server that has imported all this already, each starts in a fraction of a second.
PROCESSES = multiprocessing.get_context("forkserver")


def out_of_memory() -> None:
    """Raise what Python raises."""
    raise MemoryError


def killed_for_memory() -> None:
    """Exit as if killed by the kernel or the container."""
    os._exit(137)


def terminated() -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def digits_job(
    folder: object, config: TrainConfig, streams: tuple[StreamSpec, ...], num_labeled: int, **fields: Any
) -> TrainJob:
    """A teacher's training on the ten digits, on one CPU thread; `fields` replaces others."""
    usual = {"name": "teacher", "num_classes": 10, "seed": 0, "threads": 1, "device": "cpu"}
    return TrainJob(folder=str(folder), config=config, streams=streams, num_labeled=num_labeled, **(usual | fields))  # type: ignore[arg-type]


def train(job: TrainJob, world: int = 1, at: str = "", fault: Callable[[], None] | None = None) -> list[int | None]:
    """Run `fit` in `world` processes; return their exit codes. When one fails, kill the others, as Ray Train does.

    Args:
        at: pattern of the failpoint at which a process is killed, or `fault` is called.
    """
    PROCESSES.set_forkserver_preload([__name__])
    meeting = Path(f"{job.folder}.meeting")
    meeting.unlink(missing_ok=True)
    processes = [
        PROCESSES.Process(target=_train, args=(job, rank, world, str(meeting), at, fault)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    running = list(processes)
    while running:
        assert wait([process.sentinel for process in running], HANGS_S), "a training process hangs"
        if any(process.exitcode not in (None, 0, 128 + signal.SIGTERM) for process in processes):
            for process in running:
                process.kill()
        running = [process for process in running if process.exitcode is None]
    return [process.exitcode for process in processes]


def in_group(meeting: Path, function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """What `function(rank, *args)` returns in each of `world` processes that form a group.

    Args:
        meeting: a file that is not there yet.
    """
    PROCESSES.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(world, PROCESSES) as pool:
        found = [pool.submit(_join_group, rank, world, str(meeting), function, args) for rank in range(world)]
        return [each.result(HANGS_S) for each in found]


def _join_group(rank: int, world: int, meeting: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        return function(rank, *args)
    finally:
        distributed.destroy_process_group()


def _train(job: TrainJob, rank: int, world: int, meeting: str, at: str, fault: Callable[[], None] | None) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115 (hide progress and expected tracebacks)
    torch.set_num_threads(1)
    if fault is None:
        os.environ[VARIABLE] = at
    else:
        loop.failpoint = lambda name: fault() if fnmatchcase(name, at) else None
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        with interrupt.handled():
            fit(job)
    except interrupt.Interrupted as stop:
        sys.exit(stop.exit_code)
    if world > 1:
        distributed.destroy_process_group()
