"""Errors under corruptions: counted once per image, continued exactly, put together as the paper does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.images.corruptions import CORRUPTIONS
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.stage import Fingerprint, open_stage
from pipeline.evaluation import robustness
from pipeline.evaluation.robustness import chosen_rows, figures_of, measure_robustness
from pipeline.evaluation.stage import is_outdated
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inference.preprocessing import Preprocessing
from tests.conftest import WriteDigits
from tests.pipeline.training.test_training import CONFIG


@pytest.fixture
def test_split(tmp_path: Path, write_digits: WriteDigits) -> Split:
    write_digits(tmp_path / "test", 0, 90, per_shard=40)
    return open_split(f"{tmp_path}/test/*.tar", str(tmp_path / "index"))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Predictor]:
    """Two classifiers that see images in two ways."""
    monkeypatch.setattr(robustness, "IMAGES_PER_PART", 20)
    predictors = {}
    padded = Preprocessing.of_training(CONFIG)
    for role, preprocessing in (("teacher", padded), ("student", replace(padded, resize="crop"))):
        torch.manual_seed(len(role))
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
        predictors[role] = Predictor(model, preprocessing, "cpu", 20)
    return predictors


def parts_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_chosen_image_is_counted_under_every_condition(
    tmp_path: Path, test_split: Split, models: dict[str, Predictor]
) -> None:
    names, figures = measure_robustness(test_split, models, str(tmp_path / "out"), 50, seed=3)
    assert names == sorted(parts_of(tmp_path / "out")) == ["part-00000.json", "part-00001.json", "part-00002.json"]
    chosen = chosen_rows(90, 50, 3)
    for role, predictor in models.items():
        logits, labels = predict_split(test_split, predictor)
        assert figures[role]["images"] == 50
        assert figures[role]["clean_error"] == (logits.argmax(axis=1) != labels)[chosen].mean()
        assert list(figures[role]["errors"]) == list(CORRUPTIONS)
        assert len({error for errors in figures[role]["errors"].values() for error in errors}) > 3


def test_an_interrupted_measurement_goes_on_with_the_next_part(
    tmp_path: Path, test_split: Split, models: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure_robustness(test_split, models, str(tmp_path / "whole"), 30, seed=0)
    counted: list[int] = []
    original = robustness._count_wrong

    def count(items: Any, rows: np.ndarray, *rest: Any) -> dict[str, list[int]]:
        if len(counted) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        counted.extend([len(rows)])
        return original(items, rows, *rest)

    monkeypatch.setattr(robustness, "_count_wrong", count)
    with pytest.raises(KeyboardInterrupt):
        measure_robustness(test_split, models, str(tmp_path / "broken"), 30, seed=0)
    assert measure_robustness(test_split, models, str(tmp_path / "broken"), 30, seed=0) == whole
    assert counted == [20, 10], "no part is counted twice"
    assert parts_of(tmp_path / "broken") == parts_of(tmp_path / "whole")


def test_the_choice_is_the_seeds_and_at_most_all() -> None:
    assert chosen_rows(90, 500, 0).tolist() == list(range(90))
    first, second = chosen_rows(90, 50, 0), chosen_rows(90, 50, 1)
    assert len(set(first.tolist())) == 50
    assert first.tolist() == sorted(first.tolist()) != second.tolist()
    assert set(chosen_rows(90, 10, 0)) < set(first), "a larger choice holds the smaller one"


def test_the_mean_corruption_error_is_the_papers_with_the_teacher_for_alexnet() -> None:
    """CE of a corruption: the model's errors over all severities, divided by the baseline's; mCE: their mean."""
    teacher, student = [10] + [40] * 5 + [20] * 70, [5] + [40] * 5 + [20] * 65 + [10] * 5
    halves = [{"teacher": [n // 2 for n in teacher], "student": [n - n // 2 for n in student]},
              {"teacher": [n - n // 2 for n in teacher], "student": [n // 2 for n in student]}]  # fmt: skip
    figures = figures_of(halves, 100)
    assert figures["teacher"]["mean_corruption_error"] == pytest.approx(0.2 * 16 / 15)
    assert "error_against_teacher" not in figures["teacher"]
    assert figures["student"]["error_against_teacher"] == pytest.approx((14 * 1 + 0.5) / 15)
    assert figures["student"]["errors"]["jpeg_compression"] == [0.1] * 5
    assert figures["student"]["clean_error"] == 0.05
    assert figures_of([{"teacher": [0] * 76, "student": student}], 100)["student"]["error_against_teacher"] is None


def test_asking_for_corruptions_of_an_evaluated_run_is_no_change_of_mind(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path))
    fields = {"seed": 0, "threads": 2}  # as a version without corruptions recorded them
    open_stage(layout.evaluation, "evaluate", Fingerprint(fields, {"test": "a"})).commit([], {})
    asked = fields | {"evaluate.robustness_images": 500}
    assert is_outdated(layout, Fingerprint(asked, {"test": "a"}))
    assert is_outdated(layout, Fingerprint(fields, {"test": "b"}))
    assert not is_outdated(layout, Fingerprint(fields | {"evaluate.robustness_images": 0}, {"test": "a"}))
    assert not is_outdated(layout, Fingerprint(asked | {"seed": 1}, {"test": "a"})), "another seed is refused"


def test_small_images_are_corrupted_before_they_are_padded(
    tmp_path: Path, test_split: Split, models: dict[str, Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    original = robustness.corrupt

    def watch(image: np.ndarray, *rest: Any) -> np.ndarray:
        shapes.add(image.shape)
        return original(image, *rest)

    monkeypatch.setattr(robustness, "corrupt", watch)
    measure_robustness(test_split, models, str(tmp_path / "out"), 1, seed=0)
    assert shapes == {(8, 8, 3), (16, 16, 3)}
