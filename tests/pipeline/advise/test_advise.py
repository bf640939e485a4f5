"""Advice: the best cell within a budget, what is as good and cheaper, what a larger budget buys, and no guess beyond the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.advise.choice import choose
from pipeline.advise.costs import Cost, Costed
from pipeline.run import main

ENDLESS = Cost.endless()


def cell(name: str, errors: tuple[float, ...], hours: float, latency_ms: float = 1.0, memory_gb: float = 1.0) -> Costed:
    return Costed(name, errors, Cost(hours, latency_ms, memory_gb), {})


def test_the_best_cell_within_all_budgets_is_chosen() -> None:
    cells = [
        cell("small", (30.0, 30.1), 1), cell("slow", (10.0, 10.1), 20), cell("late", (12.0, 12.1), 2, latency_ms=9),
        cell("large", (13.0, 13.1), 2, memory_gb=99), cell("fitting", (20.0, 20.1), 2),
    ]  # fmt: skip
    advice = choose(cells, Cost(5, 5, 5))
    assert (advice.best.name, advice.equal) == ("fitting", ())
    assert advice.better is not None
    assert advice.better.name == "late"  # 1.8 times the budget; the others are 4 and 20 times


def test_cheaper_cells_that_the_seeds_do_not_tell_apart_are_named() -> None:
    cells = [cell("best", (10.0, 12.0), 5), cell("equal", (12.1, 10.2), 1), cell("worse", (15.0, 17.1), 1)]
    advice = choose(cells, Cost(9, 9, 9))
    assert (advice.best.name, [one.name for one in advice.equal]) == ("best", ["equal"])


def test_one_seed_makes_no_cells_equal() -> None:
    assert choose([cell("best", (10.0,), 5), cell("other", (10.1,), 1)], ENDLESS).equal == ()


@pytest.fixture
def study(tmp_path: Path) -> str:
    """A run with two finished cells: 10,000 images, batches of 100, steps of 36 and 360 ms."""
    folder = tmp_path / "study/ablate/scaling"
    folder.mkdir(parents=True)
    cells = [_cell(0.25, (20.0, 21.0), 36, 0.5), _cell(0.5, (15.0, 16.0), 360, 4.0)]
    content: dict[str, Any] = {"images": 10_000, "batch_size": 100, "num_classes": 10, "cells": cells, "findings": []}
    (folder / "findings.json").write_text(json.dumps(content))
    return f"{tmp_path}/study"


def _cell(width: float, errors: tuple[float, ...], step_ms: float, inference_ms: float) -> dict[str, Any]:
    changes = {
        "teacher.model": "resnetrs26", "teacher.model_args": {"width": width}, "teacher.image_size": 32, "teacher.epochs": 10,
        "teacher.augment.num_ops": 0,
    }  # fmt: skip
    return {
        "width": width, "depth": 26, "image_size": 32, "epochs": 10, "errors": errors, "parameters": 1, "flops": 1,
        "activation_bytes": 1, "step_ms": step_ms, "inference_ms": inference_ms, "changes": changes,
    }  # fmt: skip


def advise(study: str, *words: str) -> int:
    return main(["stage=advise", f"run_dir={study}-other", f"advise.study={study}", *words])


def test_the_command_prints_the_best_its_cost_its_fields_and_what_more_would_buy(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advise(study, "advise.hours=0.05") == 0  # 1,000 steps of 36 ms are 0.01 hours, of 360 ms 0.1
    text = capsys.readouterr().out
    assert (
        "advise: width 0.25, depth 26, 32 px, 10 epochs: error 20.50 % (2 seeds); 36.0 s of training, 0.5 ms an image"
        in text
    )
    assert "student.model=resnetrs26 'student.model_args={width: 0.25}' student.image_size=32 student.epochs=10" in text
    assert "better, but beyond the budget: width 0.5, depth 26, 32 px, 10 epochs: error 15.50 %" in text
    assert advise(study, "advise.latency_ms=5") == 0
    assert "advise: width 0.5, depth 26" in capsys.readouterr().out


def test_more_images_take_more_hours(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert advise(study, "advise.hours=2", "advise.images=100000") == 0
    assert (
        "advise: width 0.5, depth 26, 32 px, 10 epochs: error 15.50 % (2 seeds); 60 min 0 s" in capsys.readouterr().out
    )


@pytest.mark.parametrize(("words", "message"), [
    ([], "stage=advise needs a budget: give advise.hours, advise.latency_ms or advise.gpu_memory_gb"),
    (["advise.hours=10"], "advise.hours=10: over 4 times the study's longest training, which would take 6 min 0 s"),
    (["advise.hours=0.001"], "no cell of the study is within the budget; nearest is width 0.25, depth 26, 32 px, 10 epochs: 36.0 s"),
    (["advise.hours=1", "advise.study=nowhere"], "no finished scaling study in nowhere; run stage=ablate ablate.study=scaling first"),
])  # fmt: skip
def test_what_cannot_be_advised_is_one_sentence(
    study: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advise(study, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
