"""Training on a GPU: `pytest -m cuda`. On a CPU the same code runs in float32, so that it is known to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.shards.split import Split
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.training import loop
from pipeline.training.checkpoint import load_newest, save_checkpoint
from pipeline.training.checkpoint_writer import copy_to_host
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.objectives.interface import Terms
from pipeline.training.state import TrainState, load_trained, new_state
from pipeline.training.step import train_step, training_network
from tests.cuda.setting import NUM_CLASSES, config_for, job_for, metrics_of, on_each_device, only_on_cuda, write_colours

ALL_NOISE = AugmentConfig(crop="pad_crop", num_ops=2, brightness=0.3, contrast=0.3, cutout=4)


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return write_colours(tmp_path)


@on_each_device
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="host"),
        pytest.param({"augment_on": "device"}, id="noise on the device"),
        pytest.param({"accumulate_steps": 4, "mixup": 0.2}, id="micro-batches"),
        pytest.param({"checkpoint_activations": True}, id="activations computed twice"),
        pytest.param({"loader_workers": 2}, id="loading processes"),
    ],
)
def test_a_training_learns(split: Split, tmp_path: Path, device: str, fields: dict[str, Any]) -> None:
    job = job_for(split, config_for(device, **fields), device, tmp_path / "run")
    fit(job)
    metrics = metrics_of(job)
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert metrics[-1]["validation_top1"] > 0.6  # chance: 0.25


@only_on_cuda  # its compiler takes minutes on a CPU; tests/pipeline/training counts graphs without it
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_training_is_one_graph_compiled_once(split: Split, tmp_path: Path, device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    job = job_for(split, config_for(device, compile=True), device, tmp_path / "run")
    fit(job)
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] <= 2  # training, and evaluation of the average
    assert metrics_of(job)[-1]["validation_top1"] > 0.6


@on_each_device
def test_a_training_that_was_stopped_ends_as_one_that_was_not(split: Split, tmp_path: Path, device: str) -> None:
    """To rounding: a GPU adds in no fixed order."""
    config = config_for(device, lr=0.05)
    whole, parted = (job_for(split, config, device, tmp_path / name) for name in ("whole", "parted"))
    fit(whole)
    answers = iter([False] * 12 + [True])
    fit(parted, lambda: next(answers, False))
    fit(parted)
    ours, theirs = load_trained(parted)[0], load_trained(whole)[0]
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].cpu().float(), tensor.cpu().float(), rtol=0.05, atol=0.02, msg=name)


def tensors_of(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dictionaries and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: tensor for key, part in parts for path, tensor in tensors_of(part, f"{name}/{key}").items()}


@on_each_device
def test_a_checkpoint_holds_the_state_of_its_step_though_the_training_goes_on(
    split: Split, tmp_path: Path, device: str
) -> None:
    """The copy is not waited for, and the next steps change what is copied."""
    job = job_for(split, config_for(device), device, tmp_path / "run")
    state = new_state(job)
    network = training_network(state.model, job, world=1)
    batches = TrainBatches(job.streams, job.config, NUM_CLASSES, job.seed)
    for step in range(6):
        train_step(job, state, network, batches[step], rank=0)
        if step == 2:
            expected = {name: tensor.clone() for name, tensor in tensors_of(state.as_checkpoint()).items()}
            copied = copy_to_host(state.as_checkpoint())
    batches.close()
    save_checkpoint(job.checkpoints, 3, copied.wait())
    saved = load_newest(job.checkpoints)
    assert saved is not None
    assert saved["step"] == 3
    found = tensors_of(saved)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor.cpu())] == []
    now = tensors_of(state.as_checkpoint())
    assert any(not torch.equal(now[name], tensor) for name, tensor in expected.items()), "nothing was trained"


class Copies(TorchDispatchMode):
    """Counts copies from the host to a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in args if isinstance(value, torch.Tensor)]
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        self.count += is_copy and result.is_cuda and not given[-1].is_cuda
        return result


@only_on_cuda
def test_a_step_makes_six_copies_and_torch_finds_nothing_that_waits(
    split: Split, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"epochs": 5, "log_every_steps": 20, "loader_workers": 1, "mixup": 0.5}
    changes |= {"augment": ALL_NOISE, "augment_on": "device", "checkpoint_every_s": 1e9, "lr": 0.05}
    job = replace(job_for(split, config_for(device, **changes), device, tmp_path / "run"), validation=None)
    assert job.total_steps == 20
    original = loop.train_step
    counts: list[int] = []

    def watched(job: TrainJob, state: TrainState, *others: Any) -> Terms:
        if state.step < 5:  # constants are copied once, rotations when first drawn
            return original(job, state, *others)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with Copies() as copies:
                return original(job, state, *others)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counts.append(copies.count)

    monkeypatch.setattr(loop, "train_step", watched)
    fit(job)
    assert sorted(counts)[len(counts) // 2] == 6, "pixels, three parts of targets, noise and mixing"
