"""Noisy Student's study: rows share a teacher and its labels, and continue after a kill to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from data.images.clean_view import EvalView
from data.labels.label_files import read_labels
from data.storage.failpoint import VARIABLE
from pipeline.core.config import load_config
from pipeline.core.layout import Branch, Layout
from pipeline.core.schema import AugmentConfig, Config
from pipeline.core.stage import StageError, done_record
from pipeline.inputs.noised_view import noised
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.studies.noisy_student import NOISY_STUDENT_RECIPE
from pipeline.studies.rows import trials_of
from pipeline.studies.stage import STUDIES
from pipeline.studies.table import row_results
from pipeline.training.state import TrainState, new_state
from pipeline.trials.trial import Trial, run_trials
from student.warm_start import begin_student
from tests.conftest import WriteDigits, png
from tests.digits_run import Digits, write_digits_data
from tests.training_processes import digits_job

NOISY = STUDIES["noisy_student"]
ROWS = ("teacher", "recipe", "noised teacher", "2 generations")
STUDY = replace(NOISY, rows=tuple(row for row in NOISY.rows if row.name in ROWS))
WEIGHTS = "gen-1/student/weights/model.safetensors"


@pytest.fixture
def config(tmp_path: Path, digits: Digits, write_digits: WriteDigits) -> Config:
    write_digits_data(tmp_path, digits[1], write_digits)
    words = [
        f"run_dir={tmp_path}/run", "ablate.seeds=1", "teacher.epochs=24", "student.epochs=8", "student.loader_workers=0",
        "student.checkpoint_every_s=0", f"data.test=[{tmp_path}/nothing/is/here.tar]",
    ]  # fmt: skip
    return load_config(f"{tmp_path}/config.yaml", words)


@pytest.fixture(autouse=True)
def own_ray() -> Iterator[None]:
    """Let each test start Ray, so that workers have its environment."""
    ray.shutdown()
    yield
    ray.shutdown()


def make(config: Config, folder: Path, *rows: str) -> dict[str, Trial]:
    study = replace(STUDY, rows=tuple(row for row in STUDY.rows if row.name in rows))
    trials = trials_of(study, config, str(folder), NOISY_STUDENT_RECIPE)
    run_trials("study", trials, NOISY_STUDENT_RECIPE)
    return {trial.row: trial for trial in trials}


def folders(trial: Trial) -> set[str]:
    return {str(path.relative_to(trial.folder)) for path in Path(trial.folder).glob("gen-*/*")}


@pytest.mark.slow
def test_rows_share_the_teacher_and_its_labels_and_make_only_what_differs(config: Config, tmp_path: Path) -> None:
    trials = make(config, tmp_path / "study", *ROWS)
    assert folders(trials["teacher"]) == {f"gen-1/{n}" for n in ("teacher", "labels", "near_duplicates", "selections")}
    assert folders(trials["recipe"]) == {"gen-1/selections", "gen-1/student"}
    noised = {f"gen-1/{name}" for name in ("labels", "near_duplicates", "selections", "student")}
    assert folders(trials["noised teacher"]) == noised
    assert folders(trials["2 generations"]) == {name.replace("gen-1", "gen-2") for name in noised}
    first, second = (
        done_record(f"{trials['recipe'].folder}/gen-1/student"),
        done_record(f"{trials['2 generations'].folder}/gen-2/labels"),
    )
    assert first is not None
    assert second is not None
    assert second["fingerprint"]["inputs"]["teacher"] == first["digest"]
    assert mean_confidence(trials["noised teacher"]) < mean_confidence(trials["teacher"])
    assert not list((tmp_path / "study").rglob("checkpoints"))
    teacher, recipe, *_ = row_results(STUDY.rows, list(trials.values()))
    assert recipe.change == pytest.approx(recipe.mean - teacher.mean)
    assert recipe.details[0]["images"] == 100


def mean_confidence(trial: Trial) -> float:
    files = Path(trial.folder).glob("gen-1/labels/unlabeled-*.parquet")
    return float(np.concatenate([read_labels(str(file)).column("confidence").to_numpy() for file in files]).mean())


@pytest.mark.slow
def test_a_row_that_was_killed_continues_to_the_same_bytes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "step-10/student/*")
    with pytest.raises(OSError, match="a Ray task was lost"):
        make(config, tmp_path / "killed", "teacher", "recipe")
    checkpoints = tmp_path / "killed/recipe/seed-0/gen-1/student/checkpoints"
    assert any(checkpoints.glob("step-*.pt"))
    ray.shutdown()
    monkeypatch.delenv(VARIABLE)
    killed = make(config, tmp_path / "killed", "teacher", "recipe")["recipe"]
    whole = make(config, tmp_path / "whole", "teacher", "recipe")["recipe"]
    assert (Path(killed.folder) / WEIGHTS).read_bytes() == (Path(whole.folder) / WEIGHTS).read_bytes()
    assert killed.result() == whole.result()


def test_a_branch_finds_what_it_does_not_make_in_the_nearest_run_that_has_it(tmp_path: Path) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    for made in (far / "gen-1/teacher", far / "gen-1/labels", near / "gen-1/labels"):
        made.mkdir(parents=True)
    own = frozenset({(1, "student")})
    (near / "gen-1/student").mkdir()
    layout = Branch(str(tmp_path / "run"), 1, str(tmp_path / "home"), (str(near), str(far)), own)
    assert layout.teacher == f"{far}/gen-1/teacher"
    assert layout.labels == f"{near}/gen-1/labels"
    assert layout.student == f"{tmp_path}/run/gen-1/student"  # its own, though another has one
    assert layout.selections == f"{tmp_path}/run/gen-1/selections"  # nobody has any
    assert layout.indexes == Layout(str(tmp_path / "home")).indexes
    assert replace(layout, generation=2).teacher == layout.student


def teacher_in(layout: Layout, state: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Save weights of a small teacher, by default fresh ones."""
    state = state or build_model("resnetrs26", 10, {"width": 0.125}).state_dict()
    info = WeightsInfo(model="resnetrs26", model_args={"width": 0.125}, num_classes=10, image_size=16, crop_pct=1,
                       interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))  # fmt: skip
    save_weights(f"{layout.teacher}/weights", state, info)
    return state


def beginning(config: Config, layout: Layout) -> TrainState:
    """Return the initial state of the student's training."""
    initial = begin_student(config, layout, 10, None)
    return new_state(digits_job(layout.student, config.student, (), 100, name="student", initial=initial))


def test_a_student_from_its_teachers_weights_starts_with_them(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    teacher = teacher_in(layout)
    words = ["student.model=resnetrs26", "student.init=teacher"]
    same = load_config(None, [*words, "student.model_args={width: 0.125}"])
    begun = beginning(same, layout)
    assert all(torch.equal(teacher[name], value) for name, value in begun.model.state_dict().items())
    assert all(torch.equal(teacher[name], value) for name, value in begun.ema.module.state_dict().items())
    assert begin_student(load_config(None, []), layout, 10, None) is None


@pytest.mark.parametrize("args", ["{}", "{width: 0.125, blocks: [2, 1, 2, 2]}", "{width: 0.125, se_ratio: 0.0625}"])
def test_a_student_that_cannot_begin_as_its_teacher_is_refused(tmp_path: Path, args: str) -> None:
    layout = Layout(str(tmp_path))
    teacher_in(layout)
    other = load_config(None, ["student.model=resnetrs26", "student.init=teacher", f"student.model_args={args}"])
    with pytest.raises(StageError, match=r"student\.init=teacher: the teacher is .*0\.125.*student\.model_args"):
        begin_student(other, layout, 10, None)


def test_a_deeper_student_computes_what_its_teacher_does_before_its_first_step(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    noise = ["student.dropout=0.2", "student.stochastic_depth=0.2"]
    deeper = ["student.model=resnetrs50", "student.model_args={width: 0.125, blocks: [2, 3, 2, 4]}"]
    config = load_config(None, ["student.init=teacher", *deeper, *noise])
    teacher = build_model("resnetrs26", 10, {"width": 0.125})
    with torch.no_grad():
        for parameter in teacher.parameters():  # as after a training: no block is its shortcut
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    teacher_in(layout, teacher.state_dict())
    begun = beginning(config, layout)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(begun.model.eval()(images), teacher.eval()(images))


def test_a_noised_view_depends_on_the_image_alone_and_keeps_its_hash(digits: Digits) -> None:
    clean = EvalView(16, 1.0, "bicubic", "pad")
    view = noised(clean, AugmentConfig(crop="pad_crop", pad=2, num_ops=0, cutout=4), "bicubic", (0.3, 0.3, 0.3))
    first = png(digits[0][0])
    pixels, number = view.with_hash(first)
    assert number == clean.with_hash(first)[1]
    assert pixels.shape == (16, 16, 3)
    assert not np.array_equal(pixels, clean(first))
    assert np.array_equal(pixels, view(first))
    squares = [np.isin(view(png(image))[..., 0], (76, 77)) for image in digits[0][:2]]  # no digit has this grey
    assert squares[0].any()
    assert not np.array_equal(squares[0], squares[1])  # not the same noise for all
