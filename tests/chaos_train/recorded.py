"""Training that records the images of each step, in every process; run by `tests.chaos_train.command`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core import interrupt
from pipeline.training import launch, loop
from pipeline.training.job import TrainJob
from pipeline.training.objectives.interface import Terms

VARIABLE = "NSP_CHAOS_STEPS"  # folder of the records; inherited by Ray's workers
_fit, _fit_worker = loop.fit, launch._fit_worker


def record() -> None:
    """Record all training in this process and under Ray Train from now on."""
    launch.fit = fit
    launch._fit_worker = fit_worker


def fit_worker(config: dict[str, Any]) -> None:
    """Entry of a Ray Train process, which imports the pipeline again."""
    record()
    _fit_worker(config)


def fit(job: TrainJob, stop_requested: Callable[[], bool] = interrupt.pending) -> None:
    """`fit`, with a line for each step."""
    loop.train_step = _noting(loop.train_step, time.monotonic())
    _fit(job, stop_requested)


def _noting(train_step: Callable[..., Terms], started: float) -> Callable[..., Terms]:
    first = True

    def noting(job: TrainJob, state: Any, network: Any, batch: Any, rank: int) -> Terms:
        nonlocal first
        seconds = time.monotonic() - started if first else None
        terms = train_step(job, state, network, batch, rank)
        line = {"step": state.step - 1, "keys": batch.keys, "seconds_to_first_step": seconds}
        with Path(os.environ[VARIABLE], f"rank-{rank}.jsonl").open("a") as file:
            file.write("\n" + json.dumps(line))  # newline first: the line of a killed process may lack one
        first = False
        return terms

    return noting
