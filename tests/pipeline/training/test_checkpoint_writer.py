"""Checkpoints are written beside the training: steps go on, one checkpoint at a time, the same bytes, and errors are not lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data import storage
from data.shards.split import Split
from pipeline.training import checkpoint_writer, loop
from pipeline.training.checkpoint import load_newest, save_checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter, copy_to_host
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.objectives.interface import Terms
from pipeline.training.state import TrainState, new_state
from pipeline.training.step import train_step
from tests import HANGS_S
from tests.pipeline.training.test_checkpoints import same
from tests.pipeline.training.test_training import make_job
from tests.training_processes import terminated, train

NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/run/checkpoints/step.pt")
ALWAYS = 1e-9  # seconds between checkpoints: one is due whenever the one before is written


class SlowSave:
    """Replaces `save_checkpoint`: the first call waits for `go_on`."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.turn, self.steps = threading.Lock(), list[int]()

    def __call__(self, folder: str, step: int, content: dict[str, Any], keep: int) -> None:
        assert self.turn.acquire(blocking=False), "two checkpoints are written at once"
        self.steps.append(step)
        self.begun.set()
        assert self.go_on.wait(HANGS_S), "the training waits for its checkpoint"
        save_checkpoint(folder, step, content, keep)
        self.turn.release()


def after_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[TrainState], None]) -> None:
    """Call `call` after each step of a training."""

    def step_and_call(job: TrainJob, state: TrainState, *others: Any) -> Terms:
        terms = train_step(job, state, *others)
        call(state)
        return terms

    monkeypatch.setattr(loop, "train_step", step_and_call)


def content_of(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint without its clocks."""
    content = dict(torch.load(folder / f"checkpoints/step-{step:09d}.pt", weights_only=True))
    return content | {"timing": None}


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_is_written_and_change_nothing_in_it(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"epochs": 4, "keep_checkpoints": 100, "log_every_steps": 1}
    job = make_job(labeled, tmp_path / "whole", checkpoint_every_s=0, **changes)
    fit(job)
    slow = SlowSave()
    metrics = tmp_path / "slow/metrics.jsonl"

    def release_at_step_12(state: TrainState) -> None:
        if state.step == 2:
            assert slow.begun.wait(HANGS_S)
        if state.step == 12:
            assert slow.steps == [1], "another checkpoint is due only when the first is written"
            assert not metrics.exists(), "metrics of a checkpoint that is not durable"
            slow.go_on.set()

    after_step(monkeypatch, release_at_step_12)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    fit(make_job(labeled, tmp_path / "slow", checkpoint_every_s=ALWAYS, **changes))
    assert slow.steps[-1] == job.total_steps == 20
    for step in slow.steps:
        assert same(content_of(tmp_path / "slow", step), content_of(tmp_path / "whole", step)), step
    assert metrics.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert sorted(slow.steps) == slow.steps


def test_with_no_time_between_checkpoints_there_is_one_after_every_step(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run", checkpoint_every_s=0, keep_checkpoints=100)
    fit(job)
    names = [f"step-{step:09d}.pt" for step in range(1, job.total_steps + 1)]
    assert storage.list_names(job.checkpoints) == names


_killed_at = 0


def never_saved(folder: str, step: int, content: dict[str, Any], keep: int = 2) -> None:
    """Replaces `save_checkpoint`: a store that does not answer."""
    threading.Event().wait()


def hang_then_kill() -> None:
    """At the first step: let no checkpoint be written any more. At a later one: kill this process."""
    global _killed_at
    _killed_at += 1
    if _killed_at == 1:
        checkpoint_writer.save_checkpoint = never_saved
    else:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_costs_the_steps_since_the_one_before(
    tmp_path: Path, labeled: Split
) -> None:
    def job(name: str) -> TrainJob:
        return make_job(labeled, tmp_path / name, epochs=4, checkpoint_every_s=ALWAYS, log_every_steps=1)

    assert train(job("killed"), at="step-2/*", fault=terminated) == [128 + signal.SIGTERM]
    lines = (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    assert train(job("killed"), at="step-[38]/*", fault=hang_then_kill) == [-signal.SIGKILL]
    found = load_newest(job("killed").checkpoints)
    assert found is not None
    assert found["step"] == 3, "the checkpoint at the signal was waited for, and no later one was written"
    assert (tmp_path / "killed/metrics.jsonl").read_text().splitlines() == lines
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert train(job("killed")) == train(job("whole")) == [0]
    assert same(content_of(tmp_path / "killed", 20), content_of(tmp_path / "whole", 20))
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def no_space(folder: str, step: int, content: dict[str, Any], keep: int) -> None:
    """Replaces `save_checkpoint`."""
    raise NO_SPACE


def test_a_checkpoint_that_cannot_be_written_ends_the_training_at_the_next_step(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers, steps = list[CheckpointWriter](), list[int]()

    def recorded(*of: Any) -> CheckpointWriter:
        writers.append(CheckpointWriter(*of))
        return writers[-1]

    def wait_for_thread(state: TrainState) -> None:
        steps.append(state.step)
        if pending := writers[0]._pending:
            wait([pending], HANGS_S)

    after_step(monkeypatch, wait_for_thread)
    monkeypatch.setattr(loop, "CheckpointWriter", recorded)
    monkeypatch.setattr(
        CheckpointWriter, "is_due", lambda writer: steps == [1]
    )  # no second one, which would wait for the first
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", no_space)
    with pytest.raises(OSError, match=re.escape(str(NO_SPACE))):
        fit(make_job(labeled, tmp_path / "run", epochs=4))
    assert steps == [1, 2], "begun after step 1, known after step 2"
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("stops", [False, True])
def test_the_last_checkpoint_is_waited_for_and_its_error_raised(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", no_space)
    with pytest.raises(OSError, match="No space left"):
        fit(make_job(labeled, tmp_path / "run", checkpoint_every_s=1e9), lambda: stops)


def saved(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_copy_of_a_state_is_saved_as_the_same_bytes_and_shares_nothing_with_it(
    tmp_path: Path, labeled: Split
) -> None:
    job = make_job(labeled, tmp_path / "run", channels_last=True)
    state = new_state(replace(job, validation=None))
    tied = torch.arange(6.0)
    for parameter in state.model.parameters():
        state.optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    state.metrics.append({"step": 1, "loss": 0.5})
    content = state.as_checkpoint() | {"tied": [tied, tied[2:4], tied]}
    before = saved(content)
    copied = copy_to_host(content).wait()
    assert saved(copied) == before
    with torch.no_grad():
        for tensor in [tied, *state.model.state_dict().values(), *state.ema.module.state_dict().values()]:
            tensor.zero_()
    state.metrics.append({"step": 2, "loss": 0.25})
    state.optimizer.param_groups[0]["lr"] = 77.0
    assert saved(copied) == before
    assert saved(content) != before
