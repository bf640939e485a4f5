"""Between log lines the host never waits for the device, and a loss that is not finite is found all the same."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from data import storage
from data.shards.split import Split
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.training import loop
from pipeline.training.distributed import Ranks
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.loop import fit
from pipeline.training.losses import StepLosses
from pipeline.training.state import new_state
from tests.pipeline.training.test_training import make_job
from tests.training_processes import in_group

aten = torch.ops.aten
# On a GPU, the host waits for these: a value that is read, or a result whose size depends on values.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default}
# Tensors of Python's values: on a GPU, each is copied there. (from_numpy shares an array, which has one copy of its own.)
UPLOADS = {torch.tensor, torch.as_tensor, torch.scalar_tensor}
ALL_NOISE = AugmentConfig(crop="pad_crop", num_ops=2, brightness=0.3, contrast=0.3, cutout=4)


class Uploads(TorchFunctionMode):
    """Calls `note` with the name of each function of `UPLOADS` that is called."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in UPLOADS:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Calls `note` with the name of each operation of `READS` that is called, in the backward pass, too."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.note(str(func))
        return func(*args, **(kwargs or {}))


class Waits:
    """Notes at which step of a training what is read or uploaded."""

    def __init__(self) -> None:
        self.step = 0
        self.found: dict[int, list[str]] = defaultdict(list)

    def begin_step(self, name: str) -> None:
        """Replaces `failpoint`, whose first call in a step has its number."""
        if name.startswith("step-"):
            self.step = int(name.removeprefix("step-").partition("/")[0]) + 1

    def note(self, name: str) -> None:
        """Add to the present step."""
        self.found[self.step].append(name)


@pytest.mark.parametrize("augment_on", ["host", "device"])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_of_20_steps_only_those_with_a_log_line_wait(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, augment_on: str, accumulate_steps: int
) -> None:
    changes: dict[str, Any] = {"epochs": 4, "log_every_steps": 10, "checkpoint_every_s": 1e9, "loader_workers": 1}
    changes |= {"augment": ALL_NOISE, "augment_on": augment_on, "mixup": 0.5, "accumulate_steps": accumulate_steps}
    job = replace(make_job(labeled, tmp_path / "run", **changes), validation=None)
    assert job.total_steps == 20
    waits = Waits()
    monkeypatch.setattr(loop, "failpoint", waits.begin_step)
    with Uploads(waits.note), Reads(waits.note):
        fit(job)
    later = {step: found for step, found in waits.found.items() if step > 1}  # the first makes constants, once
    assert later.keys() == {10, 20}, later
    assert waits.found[10] == ["aten._local_scalar_dense.default"], (
        "one look at the weights; that at the losses is a copy"
    )


def reads_of_two(rank: int, job: TrainJob) -> dict[int, list[str]]:
    waits = Waits()
    loop.failpoint = waits.begin_step  # in this process alone
    with Reads(waits.note):
        fit(job)
    return dict(waits.found)


@pytest.mark.slow
def test_of_20_steps_of_two_processes_only_those_with_a_log_line_wait(tmp_path: Path, labeled: Split) -> None:
    changes: dict[str, Any] = {"epochs": 4, "log_every_steps": 10, "checkpoint_every_s": 1e9, "accumulate_steps": 2}
    job = replace(make_job(labeled, tmp_path / "run", **changes), validation=None)
    for found in in_group(tmp_path / "meeting", reads_of_two, job):
        later = {step: names for step, names in found.items() if step > 1}
        assert later == {10: ["aten._local_scalar_dense.default"], 20: ["aten._local_scalar_dense.default"]}


def failing_job(labeled: Split, folder: Path, **changes: Any) -> TrainJob:
    return replace(make_job(labeled, folder, lr=1e30, epochs=4, **changes), validation=None)


def step_that_fails(job: TrainJob, **stop: Any) -> int:
    with pytest.raises(
        TrainingError, match=r"(the loss is (nan|inf) at|weights are not finite after) step \d+"
    ) as caught:
        fit(job, **stop)
    return int(str(caught.value).partition(" step ")[2].split()[0].rstrip(","))


def test_a_loss_that_was_not_finite_steps_ago_is_named_by_its_step_and_images(tmp_path: Path, labeled: Split) -> None:
    at_once = step_that_fails(failing_job(labeled, tmp_path / "at-once", log_every_steps=1))
    late = failing_job(labeled, tmp_path / "late", log_every_steps=20)
    assert step_that_fails(late) == at_once < 19
    batches = TrainBatches(late.streams, late.config, 10, late.seed)
    assert (tmp_path / "late/non_finite_batch.txt").read_text().splitlines() == batches.keys(at_once - 1)
    batches.close()


def test_no_checkpoint_holds_values_that_are_not_finite(tmp_path: Path, labeled: Split) -> None:
    """Neither when the training is stopped long before it would look at its losses, nor when only the weights are not finite yet."""
    asked = iter(range(1000))
    job = failing_job(labeled, tmp_path / "run", log_every_steps=1000)
    step_that_fails(job, stop_requested=lambda: next(asked) == 9)
    assert storage.list_names(job.checkpoints) == []


def test_weights_that_are_not_finite_after_a_finite_loss_stop_the_training(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run")
    state = new_state(job)
    state.step = 2
    batches = TrainBatches(job.streams, job.config, 10, job.seed)
    losses = StepLosses(job, batches, Ranks())
    for loss in (1.5, 1.25):
        losses.append(torch.tensor(loss))
    losses.look(state)
    assert (state.loss_sum, state.loss_count, losses.newest) == (2.75, 2, 1.25)
    losses.append(torch.tensor(1.0))
    state.step = 3
    with torch.no_grad():
        next(state.model.parameters()).flatten()[7] = torch.inf
    with pytest.raises(
        TrainingError, match=r"weights are not finite after step 3, whose loss is 1 .*Lower teacher\.lr"
    ):
        losses.look(state)
    batches.close()


def test_the_log_does_not_depend_on_how_often_a_checkpoint_asks_for_a_look(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run")
    batches = TrainBatches(job.streams, job.config, 10, job.seed)
    values = [1.0, 2.0**-53, 2.0**-53]  # the last two are lost one by one, not together
    sums = set()
    for looks in ({3}, {1, 3}):
        state, losses = new_state(job), StepLosses(job, batches, Ranks())
        for step, value in enumerate(values, 1):
            losses.append(torch.tensor(value), {"spread": torch.tensor(value)})
            state.step = step
            if step in looks:
                losses.look(state)
        sums.add((state.loss_sum, state.metric_sums["spread"]))
    batches.close()
    assert len(sums) == 1


def test_the_first_of_several_losses_that_are_not_finite_is_named(tmp_path: Path, labeled: Split) -> None:
    job = make_job(labeled, tmp_path / "run")
    state = new_state(job)
    state.step = 4
    batches = TrainBatches(job.streams, job.config, 10, job.seed)
    losses = StepLosses(job, batches, Ranks())
    for loss in (1.5, torch.nan, 1.0, torch.inf):
        losses.append(torch.tensor(loss))
    with pytest.raises(TrainingError, match="the loss is nan at step 2 "):
        losses.look(state)
    batches.close()
