"""fit() with the objectives of pretraining: exact continuation, several ranks, what is measured on the way."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from data.shards.split import Split, open_split
from pipeline.core.schema import PretrainConfig
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.training.checkpoint import load_newest
from pipeline.training.evaluation import report_collapse
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.progress import read_training_progress
from pipeline.training.state import load_trained
from tests.conftest import make_writer
from tests.digits_run import Digits
from tests.pipeline.training.test_micro_batches import stay_frozen
from tests.training_processes import digits_job, in_group, terminated, train

IMAGES, BATCH = 24, 8
EPOCH = IMAGES // BATCH
TOTAL = 3 * EPOCH
CONFIG = PretrainConfig.model_validate(
    {
        "model": "resnetrs26", "model_args": {"width": 0.125, "blocks": [1, 1, 1, 1]}, "image_size": 16,
        "epochs": TOTAL / EPOCH, "batch_size": BATCH, "warmup_epochs": 0.5, "lr": 2.0, "optimizer": "momentum", "ema_decay": 0.9,
        "loader_workers": 0, "log_every_steps": 2, "eval_every_epochs": 1, "checkpoint_every_s": 0, "projection_dim": 16,
        "temperature": 0.5, "augment": {"crop": "pad_crop", "color_jitter": 0.5, "blur": [0.0]},
    }
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A folder, and a split of 24 labeled images in three shards."""

    folder: Path
    split: Split

    def job(self, name: str, images: int = BATCH, **changes: Any) -> TrainJob:
        """A pretraining that saves at every step; `images`: a step."""
        stream: StreamSpec = replace(labeled_stream(self.split, images), targets="none", views=2)
        config = CONFIG.model_copy(update={"batch_size": images} | changes)
        fields = {"name": "pretrain", "num_classes": 0, "validation": self.split}
        return digits_job(self.folder / name, config, (stream,), IMAGES, **fields)

    def result(self, name: str) -> tuple[dict[str, bytes], bytes]:
        """Bytes of each tensor of weights, average and momentum, and metrics."""
        checkpoint = load_newest(str(self.folder / name / "checkpoints"))
        assert checkpoint is not None
        assert checkpoint["step"] == TOTAL
        parts = {"model": checkpoint["model"], "ema": checkpoint["ema"]["module"]}
        parts |= {f"momentum {number}": values for number, values in checkpoint["optimizer"]["state"].items()}
        tensors = {f"{part} {key}": value for part, values in parts.items() for key, value in values.items()}
        contents = {key: value.numpy().tobytes() for key, value in tensors.items() if isinstance(value, torch.Tensor)}
        return contents, (self.folder / name / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Data:
    folder = tmp_path_factory.mktemp("pretraining")
    make_writer(digits)(folder / "labeled", 0, IMAGES, per_shard=8)
    return Data(folder, open_split(f"{folder}/labeled/*.tar", str(folder / "index")))


@pytest.mark.parametrize(
    "objective", ["simclr", *(pytest.param(other, marks=pytest.mark.slow) for other in ("byol", "simclrv2"))]
)
def test_killed_or_stopped_anywhere_it_makes_the_same_bytes(data: Data, objective: str) -> None:
    assert train(data.job(f"whole-{objective}", objective=objective)) == [0]
    job = data.job(f"killed-{objective}", objective=objective)
    for at in ("step-1/*", f"step-{EPOCH + 1}/*", f"evaluation-{2 * EPOCH}/*"):
        assert train(job, at=at) == [-signal.SIGKILL], f"not killed at {at}"
    assert train(job, at=f"step-{2 * EPOCH + 1}/*", fault=terminated) == [128 + signal.SIGTERM]
    assert train(job) == [0]
    assert data.result(f"killed-{objective}") == data.result(f"whole-{objective}")


@pytest.mark.slow
def test_noise_on_the_device_and_checkpointed_activations_continue_to_the_same_bytes(data: Data) -> None:
    changes: dict[str, Any] = {
        "augment_on": "device",
        "checkpoint_activations": True,
        "objective": "byol",
        "accumulate_steps": 2,
    }
    assert train(data.job("whole-device", **changes)) == [0]
    job = data.job("killed-device", **changes)
    assert train(job, at=f"step-{EPOCH + 1}/*") == [-signal.SIGKILL]
    assert train(job) == [0]
    assert data.result("killed-device") == data.result("whole-device")


def test_noise_on_the_device_is_that_of_the_host(data: Data) -> None:
    assert train(data.job("host")) == [0]
    assert train(data.job("device", augment_on="device")) == [0]
    assert data.result("device") == data.result("host")


def fit_frozen(rank: int, job: TrainJob) -> None:
    """In a process of its own, with batch norms that amplify no rounding."""
    _BatchNorm.train = stay_frozen  # type: ignore[method-assign, assignment]
    fit(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "lr", "spread"),
    [("simclr", 0.2, 0.05), pytest.param("byol", 0.05, 0.015, marks=pytest.mark.slow)],
)
def test_two_ranks_train_as_one_within_rounding(data: Data, objective: str, lr: float, spread: float) -> None:
    """With frozen norms, the features that BYOL measures have a spread of 0.03 before the first step."""

    def job(name: str) -> TrainJob:
        return data.job(f"{name}-{objective}", objective=objective, log_every_steps=1, lr=lr)

    for world, name in enumerate(("one", "two"), 1):
        in_group(data.folder / f"meeting-{objective}-{name}", fit_frozen, job(name), world=world)
    one, two = (load_lines(data.folder / f"{name}-{objective}") for name in ("one", "two"))
    losses = [line["loss"] for line in one if "loss" in line]
    assert len(losses) == TOTAL
    assert max(losses) - min(losses) > 0.01, "equal losses would say little"
    assert all(line["spread"] > spread for line in one if "spread" in line), "so would features that have collapsed"
    for theirs, ours in zip(two, one, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    trained = [load_trained(job(name))[0] for name in ("one", "two")]
    for name, weights in trained[0].items():
        torch.testing.assert_close(trained[1][name], weights, rtol=1e-3, atol=1e-4, msg=name)


def load_lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loss_spread_and_neighbours_are_measured_while_it_runs(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    job = data.job("measured", images=12, epochs=40, lr=4.0)
    fit(job)
    lines = load_lines(data.folder / "measured")
    logged, measured = [line for line in lines if "loss" in line], [line for line in lines if "knn_top1" in line]
    assert sum(line["loss"] for line in logged[-5:]) < sum(line["loss"] for line in logged[:5]) - 0.5, (
        "nothing is learned"
    )
    assert [line["step"] for line in measured] == list(range(2, 82, 2))
    assert all(0.1 < line["spread"] <= 1.5 for line in logged)
    assert "kNN top-1" in (printed := capsys.readouterr().out)
    assert f"({IMAGES} labeled images, leave-one-out), feature spread" in printed
    progress = read_training_progress(job.folder)
    assert progress is not None
    assert progress.figures == {name: measured[-1].get(name, logged[-1].get(name)) for name in ("spread", "knn_top1")}
    assert "kNN top-1 " in progress.describe()


def test_collapse_is_said_once(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    job = data.job("collapsing")
    lines: list[dict[str, float]] = []
    for step, spread in enumerate((0.8, 0.3, 0.05, 0.04, 0.03), 1):
        lines.append({"step": step, "spread": spread})
        report_collapse(job, lines)
    lines.append({"step": 5, "knn_top1": 0.1})
    report_collapse(job, lines)
    printed = capsys.readouterr().out
    assert printed.count("THE FEATURES HAVE COLLAPSED") == 1
    assert "spread 0.050" in printed
    assert "Lower pretrain.lr" in printed
