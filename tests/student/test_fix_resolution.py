"""The train-test resolution fix: trains the last layers alone, at a larger size, without noise, and continues exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.images.resize import eval_transform
from data.settings import UsageError
from data.shards.split import Split
from pipeline.core.config import load_config
from pipeline.core.schema import StudentConfig
from pipeline.inputs.streams import labeled_stream
from pipeline.inputs.train_transform import make_transform
from pipeline.models.registry import build_model
from pipeline.training import loop
from pipeline.training.checkpoint import load_newest
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.loop import fit
from pipeline.training.objectives.interface import Terms
from pipeline.training.state import TrainState, freeze_early_layers, load_trained
from pipeline.training.step import to_training_mode
from student.fix_resolution import fix_resolution_job
from tests.pipeline.training.test_training import CONFIG
from tests.training_processes import digits_job

FIX: dict[str, Any] = {
    "unlabeled_ratio": 0, "mixup": 0.5, "fix_resolution_epochs": 2, "fix_resolution_image_size": 24, "fix_resolution_lr": 0.1,
}  # fmt: skip
STUDENT = StudentConfig.model_validate(CONFIG.model_dump() | FIX)


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Kill the training after that many steps, before the last one is written."""
    original = loop.train_step

    def step_or_die(job: TrainJob, state: TrainState, *others: Any) -> Terms:
        terms = original(job, state, *others)
        if state.step == step:
            raise Killed
        return terms

    monkeypatch.setattr(loop, "train_step", step_or_die)


def same_tensors(a: Any, b: Any) -> bool:
    """Compare two checkpoints, except for times."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tensors(a[key], b[key]) for key in a if key != "timing")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_tensors, a, b))
    return bool(a == b)


def make_jobs(labeled: Split, folder: Path, **changes: Any) -> tuple[TrainJob, TrainJob]:
    """The student's own training, and the resolution fix after it."""
    student = STUDENT.model_copy(update=changes)
    streams = (labeled_stream(labeled, student.batch_size),)
    job = digits_job(folder, student, streams, labeled.num_samples, name="student", validation=labeled)
    fixing = fix_resolution_job(job, student)
    assert fixing is not None
    return job, fixing


def weights_after(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_trained(job)[0]


def test_only_layers_after_the_last_convolutions_are_trained() -> None:
    model = build_model("resnetrs26", 10, {"width": 0.125})
    freeze_early_layers(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained[:2] == ["layer4.1.bn3.weight", "layer4.1.bn3.bias"]
    assert trained[-2:] == ["fc.weight", "fc.bias"]
    assert all(name.startswith(("layer4.1.bn3", "layer4.1.se", "fc")) for name in trained)


@pytest.mark.parametrize(
    ("name", "expected"), [("efficientnet_b0", {"bn2", "classifier"}), ("vit_tiny_patch16_224", {"norm", "head"})]
)
def test_the_last_norm_and_the_classifier_of_timms_models_are_trained(name: str, expected: set[str]) -> None:
    model = build_model(name, 10, {})
    freeze_early_layers(model)
    trained = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == expected


def test_only_frozen_batch_norms_are_in_eval_mode() -> None:
    model = to_training_mode(build_model("resnetrs26", 10, {"width": 0.125}))
    assert all(module.training for module in model.modules())
    freeze_early_layers(model)
    norms = [module for module in to_training_mode(model).modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.training for norm in norms] == [False] * (len(norms) - 1) + [True]


def test_a_norm_without_gains_is_in_eval_mode_only_after_a_frozen_layer() -> None:
    norms = [nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2, affine=False)]
    network = to_training_mode(nn.Sequential(nn.Linear(2, 2), norms[0], nn.Linear(2, 2), norms[1]))
    assert [norm.training for norm in norms] == [True, True]
    network.get_submodule("0").requires_grad_(False)
    to_training_mode(network)
    assert [norm.training for norm in norms] == [False, True]


def test_it_starts_from_the_averaged_weights_and_changes_only_the_last_layers(tmp_path: Path, labeled: Split) -> None:
    job, fixing = make_jobs(labeled, tmp_path / "run")
    fit(job)
    fit(fixing)
    before, after = weights_after(job), weights_after(fixing)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {"layer4", "fc"}
    norms = {name for name in changed if ".bn" in name or "downsample" in name}
    assert norms == {f"layer4.0.downsample.2.{part}" for part in
                     ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip


def test_it_cannot_start_before_the_students_training_has_ended(tmp_path: Path, labeled: Split) -> None:
    _, fixing = make_jobs(labeled, tmp_path / "run")
    with pytest.raises(TrainingError, match="training has not reached step 10"):
        fit(fixing)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_resolution_fix_continues_to_identical_weights(
    tmp_path: Path, labeled: Split, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    job, fixing = make_jobs(labeled, tmp_path / "run", checkpoint_every_s=0, epochs=0.2, warmup_epochs=0)
    fit(job)
    whole, broken = (replace(fixing, folder=str(tmp_path / name)) for name in ("whole", "broken"))
    fit(whole)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            fit(broken)
    fit(broken)
    checkpoints = [load_newest(f"{part.folder}/checkpoints") for part in (whole, broken)]
    assert checkpoints[0] is not None
    assert checkpoints[0]["step"] == 10
    assert same_tensors(*checkpoints)


def test_its_images_are_larger_and_equal_the_views_of_inference(
    tmp_path: Path, labeled: Split, photo: np.ndarray
) -> None:
    config = make_jobs(labeled, tmp_path / "run")[1].config
    assert (config.image_size, config.dropout, config.stochastic_depth, config.mixup) == (24, 0, 0, 0)
    for width, difference in ((427, 0.0), (570, 1.0)):  # mean over pixels; a square image has none
        image = photo[:, :width].copy()
        seen = make_transform(config)(image, 3).permute(1, 2, 0).numpy().astype(int)
        expected = eval_transform(image, 24, config.crop_pct, config.interpolation).astype(int)
        assert abs(seen - expected).mean() <= difference


def test_it_runs_only_if_configured_and_needs_a_size(tmp_path: Path, labeled: Split) -> None:
    job, _ = make_jobs(labeled, tmp_path / "run")
    assert fix_resolution_job(job, STUDENT.model_copy(update={"fix_resolution_epochs": 0})) is None
    words = ["student.image_size=32", "student.fix_resolution_epochs=2"]
    for size in (None, 28):
        message = f"student.fix_resolution_image_size={size}: expected at least student.image_size=32"
        with pytest.raises(UsageError, match=message):
            load_config("fashion_mnist", [*words, *([f"student.fix_resolution_image_size={size}"] if size else [])])
