"""Fine-tuning: a backbone frozen for the first epochs, statistics too; the head's learning rate; the same bytes after a stop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.shards.split import Split
from pipeline.models.initial_weights import InitialWeights
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.training import step as step_module
from pipeline.training.checkpoint import load_newest
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.optimizer import build_optimizer
from pipeline.training.state import freeze_backbone, load_trained, new_state
from tests.pipeline.training.test_training import MODEL, make_job
from tests.training_processes import train

EPOCH = 5  # steps; 100 images in batches of 20
FROZEN = {"freeze_backbone_epochs": 1, "bn_momentum": 0.5, "checkpoint_every_s": 0, "log_every_steps": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of 7 classes, with batch norm statistics that are not those of a new model."""
    folder = str(tmp_path_factory.mktemp("source") / "weights")
    torch.manual_seed(5)
    model = build_model(MODEL["model"], 7, MODEL["model_args"])  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.3, 0.8)
    values = {
        "num_classes": 7,
        "image_size": 16,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    save_weights(folder, model.state_dict(), WeightsInfo.model_validate(MODEL | values))
    return folder


def job_in(labeled: Split, folder: Path, source: str, **changes: Any) -> TrainJob:
    job = make_job(labeled, folder, **(FROZEN | changes))
    return replace(job, validation=None, initial=InitialWeights("teacher.init", source))


def stop_after(job: TrainJob, steps: int) -> dict[str, Any]:
    """Train `steps` steps more; return the checkpoint."""
    fit(job, partial(next, iter([False] * (steps - 1) + [True])))
    found = load_newest(job.checkpoints)
    assert found is not None
    return found


def differing(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in one.items() if not torch.equal(tensor, two[name])}


def tensors_of(job: TrainJob) -> dict[str, bytes]:
    """Bytes of each tensor of the last checkpoint: weights, EMA, the optimizer's state; and the learning rates."""
    found = load_newest(job.checkpoints)
    assert found is not None
    assert found["step"] == job.total_steps
    state = found["optimizer"]["state"]
    groups = {"model": found["model"], "ema": found["ema"]["module"]} | {f"state {n}": state[n] for n in state}
    tensors = {f"{group} {name}": value for group, values in groups.items() for name, value in values.items()}
    rates = [group["lr"] for group in found["optimizer"]["param_groups"]]
    return {name: value.numpy().tobytes() for name, value in tensors.items()} | {"rates": repr(rates).encode()}


def test_only_the_head_changes_in_frozen_epochs_and_then_everything(
    labeled: Split, tmp_path: Path, source: str
) -> None:
    job = job_in(labeled, tmp_path / "run", source)
    assert job.frozen_steps == EPOCH
    before = {name: tensor.clone() for name, tensor in new_state(job).model.state_dict().items()}
    frozen = stop_after(job, EPOCH)
    assert differing(before, frozen["model"]) == {"fc.weight", "fc.bias"}
    assert differing(before, frozen["ema"]["module"]) == {"fc.weight", "fc.bias"}
    thawed = stop_after(job, 1)["model"]
    changed = differing(frozen["model"], thawed)
    assert {"conv1.0.weight", "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked", "fc.weight"} <= changed


def test_a_training_that_is_frozen_to_its_end_changes_the_head_alone(
    labeled: Split, tmp_path: Path, source: str
) -> None:
    job = job_in(labeled, tmp_path / "run", source, epochs=1.1, freeze_backbone_epochs=1.1, warmup_epochs=0)
    assert job.frozen_steps == job.total_steps == 6
    before = {name: tensor.clone() for name, tensor in new_state(job).model.state_dict().items()}
    fit(job)
    assert differing(before, load_trained(job)[0]) == {"fc.weight", "fc.bias"}


def test_a_backbone_that_is_not_frozen_changes_at_once(labeled: Split, tmp_path: Path, source: str) -> None:
    job = job_in(labeled, tmp_path / "run", source, freeze_backbone_epochs=0)
    before = new_state(job).model.state_dict()
    assert "bn1.running_mean" in differing(before, stop_after(job, 1)["model"])


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_stopped_before_at_and_after_the_end_of_the_frozen_epochs_the_bytes_are_the_same(
    labeled: Split, tmp_path: Path, source: str, optimizer: str
) -> None:
    changes = {"optimizer": optimizer, "lr": 0.05, "init_head_lr_scale": 3.0}
    whole, parts = (job_in(labeled, tmp_path / name, source, **changes) for name in ("whole", "parts"))
    fit(whole)
    for steps in (EPOCH - 1, 1, 1):
        stop_after(parts, steps)
    fit(parts)
    assert tensors_of(whole) == tensors_of(parts)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "parts/metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_freeze_alike_and_continue_to_the_same_bytes(labeled: Split, tmp_path: Path, source: str) -> None:
    whole, parts = (job_in(labeled, tmp_path / name, source, workers=2) for name in ("whole", "parts"))
    assert train(whole, world=2) == [0, 0]
    assert -9 in train(parts, world=2, at=f"step-{EPOCH + 1}/teacher/rank-0")
    assert train(parts, world=2) == [0, 0]
    one, two = (load_trained(job)[0] for job in (whole, parts))
    assert not differing(one, two)
    start = new_state(whole).model.state_dict()
    assert "layer4.0.conv1.weight" in differing(start, one)


def test_a_frozen_backbone_gets_no_gradients(
    labeled: Split, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take twice the time of a forward pass."""
    trained: list[set[str]] = []
    original = step_module.train_step

    def noting(job: TrainJob, state: Any, *others: Any) -> Any:
        terms = original(job, state, *others)
        trained.append({name for name, parameter in state.model.named_parameters() if parameter.grad is not None})
        return terms

    monkeypatch.setattr("pipeline.training.loop.train_step", noting)
    fit(job_in(labeled, tmp_path / "run", source))
    assert trained[:EPOCH] == [{"fc.weight", "fc.bias"}] * EPOCH
    assert all(len(names) > 20 for names in trained[EPOCH:])


def test_the_heads_learning_rate_is_scaled_and_weight_decay_stays_where_it_was() -> None:
    model = build_model("resnetrs26", 7, MODEL["model_args"])  # type: ignore[arg-type]
    plain = build_optimizer(model, 0.9, 0.01).param_groups
    assert len(plain) == 2
    assert "lr_scale" not in plain[0]
    groups = build_optimizer(model, 0.9, 0.01, head_lr_scale=10.0).param_groups
    scales = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in plain for p in group["params"]}
    head = {id(p) for p in model.get_submodule("fc").parameters()}
    assert scales == {p: (10.0 if p in head else 1.0, decay) for p, decay in decays.items()}


def test_the_scale_reaches_the_step(labeled: Split, tmp_path: Path, source: str) -> None:
    job = job_in(labeled, tmp_path / "run", source, init_head_lr_scale=4.0, freeze_backbone_epochs=0)
    groups = stop_after(job, 4)["optimizer"]["param_groups"]
    rates = {group["lr"] for group in groups}
    assert rates == {job.learning_rate(3), 4 * job.learning_rate(3)}


def test_without_first_weights_nothing_is_frozen(labeled: Split, tmp_path: Path) -> None:
    """The fields belong to `init`; a later training of a job that had it, as the resolution fix, begins elsewhere."""
    job = make_job(labeled, tmp_path / "run", **(FROZEN | {"init_head_lr_scale": 4.0}))
    assert job.frozen_steps == 0
    assert len(new_state(job).optimizer.param_groups) == 2


def test_freezing_leaves_the_head() -> None:
    model = build_model("tf_efficientnet_lite0", 7, {})
    freeze_backbone(model, True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    freeze_backbone(model, False)
    assert all(p.requires_grad for p in model.parameters())
