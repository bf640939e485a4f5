"""What models cost to use: measured beside the evaluation, shown in the report, and no part of what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.layout import Layout
from pipeline.core.stage import done_record
from pipeline.evaluation import speed
from pipeline.evaluation.speed import _measure
from pipeline.evaluation.summary import write_speed
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.registry import build_model
from pipeline.report.build import write_report
from tests.conftest import WriteDigits
from tests.small_run import NUM_TEST, SmallRun

SPEED = {
    "where": "CPU, 1 thread",
    "models": {
        "teacher": {"latency_ms": 1.25, "images_per_s": 2310.4, "batch_size": 64},
        "student": {"latency_ms": 2.5, "images_per_s": 1240.0, "batch_size": 64},
    },
}


def predictor(width: float) -> Predictor:
    torch.set_num_threads(1)
    preprocessing = Preprocessing(32, 0.875, "bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)
    return Predictor(build_model("resnetrs26", 10, {"width": width}), preprocessing, "cpu")


def test_a_network_of_eight_times_the_width_is_slower_alone_and_in_batches() -> None:
    narrow, wide = (_measure(predictor(width), 256) for width in (0.125, 1.0))
    assert wide["latency_ms"] > narrow["latency_ms"]
    assert wide["images_per_s"] < narrow["images_per_s"] / 2


@pytest.mark.parametrize(("image_s", "batch_size"), [(0.001, 64), (0.05, 20), (3.0, 1)])
def test_a_batch_takes_about_a_second_at_most(monkeypatch: pytest.MonkeyPatch, image_s: float, batch_size: int) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda _, size: size * image_s)
    measured = _measure(predictor(0.125), 256)
    assert measured["batch_size"] == batch_size
    assert measured["images_per_s"] == pytest.approx(1 / image_s, abs=0.05)


def evaluated(folder: Path, write: WriteDigits) -> tuple[SmallRun, Layout]:
    run = SmallRun(folder, write)
    layout = Layout(run.config().run_dir)
    run.model(layout.teacher, "teacher")
    run.model(layout.student, "student")
    right = np.arange(NUM_TEST)
    run.evaluate(layout, {"teacher": right < 300, "student": right < 320})
    return run, layout


def test_the_report_shows_costs_and_an_accuracy_speed_plot(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    run, layout = evaluated(tmp_path, write_digits)
    write_speed(layout.evaluation, SPEED)
    write_report(run.config(truth=False), [layout])
    html = (Path(layout.run_dir) / "report.html").read_text()
    assert "one image alone, ms</th><td>1.25</td><td>2.50</td>" in html
    assert "images/s, in batches</th><td>2,310</td><td>1,240</td>" in html
    assert "teacher 75.00 % at 2,310 images/s; student 80.00 % at 1,240 images/s" in html
    said = "speed (CPU, 1 thread): teacher 1.25 ms an image alone, 2,310 images/s in batches; student 2.50 ms"
    assert said in capsys.readouterr().out


def test_an_evaluation_without_clocks_is_reported_without_costs(tmp_path: Path, write_digits: WriteDigits) -> None:
    run, layout = evaluated(tmp_path, write_digits)
    write_report(run.config(truth=False), [layout])
    assert "one image alone" not in (Path(layout.run_dir) / "report.html").read_text()


def test_clocks_are_no_part_of_the_committed_output(tmp_path: Path, write_digits: WriteDigits) -> None:
    _, layout = evaluated(tmp_path, write_digits)
    before = done_record(layout.evaluation)
    write_speed(layout.evaluation, SPEED)
    assert done_record(layout.evaluation) == before
    assert before is not None
    assert "latency_ms" not in json.dumps(before)
