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
    found = _measure({"narrow": predictor(0.125), "wide": predictor(1.0)}, 256)
    narrow, wide = found["narrow"], found["wide"]
    assert wide["latency_ms"] > narrow["latency_ms"]
    assert wide["images_per_s"] < narrow["images_per_s"] / 2


@pytest.mark.parametrize(("image_s", "batch_size"), [(0.001, 64), (0.05, 20), (3.0, 1)])
def test_a_batch_takes_about_a_second_at_most(monkeypatch: pytest.MonkeyPatch, image_s: float, batch_size: int) -> None:
    monkeypatch.setattr(speed, "_seconds", lambda _, size: size * image_s)
    measured = _measure({"teacher": predictor(0.125)}, 256)["teacher"]
    assert measured["batch_size"] == batch_size
    assert measured["images_per_s"] == pytest.approx(1 / image_s, abs=0.05)


def test_speeds_are_medians_of_rounds_in_which_all_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause in the third round changes no median, and shows as spread."""
    calls: list[str] = []
    models = {"teacher": predictor(0.125), "student": predictor(0.125)}
    roles = {id(model): role for role, model in models.items()}

    def seconds(model: Predictor, size: int) -> float:
        calls.append(roles[id(model)])
        return 0.001 * size * (3 if len(calls) in (11, 12) else 1)

    monkeypatch.setattr(speed, "_seconds", seconds)
    found = _measure(models, 256)
    assert calls[2:] == ["teacher", "teacher", "student", "student"] * 5  # after one call each for the batch size
    assert found["teacher"] == {"latency_ms": 1.0, "images_per_s": 1000.0, "batch_size": 64, "spread": 2.0}
    assert found["student"] == found["teacher"] | {"spread": 0.0}


@pytest.mark.parametrize(
    ("device", "worked_s", "spread", "busy"),
    [("cpu", 9.5, 0.1, False), ("cpu", 9.5, 0.3, True), ("cpu", 5.0, 0.1, True), ("cuda", 5.0, 0.1, False)],
)
def test_a_busy_machine_is_seen_by_rounds_that_differ_or_by_waiting_for_a_core(
    monkeypatch: pytest.MonkeyPatch, device: str, worked_s: float, spread: float, busy: bool
) -> None:
    """Of the 10 seconds that the rounds take, this thread works for some."""
    ticks = {"perf_counter": iter((0.0, 10.0)), "thread_time": iter((0.0, worked_s))}
    for name, values in ticks.items():
        monkeypatch.setattr(speed.time, name, values.__next__)
    monkeypatch.setattr(speed, "_measure", lambda models, size: {"teacher": {"spread": spread}})
    found = speed.measure_speed({}, device, 1, 256)
    monkeypatch.undo()  # pytest asks for the time, too
    assert found["busy"] == busy


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


def test_speeds_of_a_busy_machine_are_no_facts(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    run, layout = evaluated(tmp_path, write_digits)
    models = {role: figures | {"spread": 0.46} for role, figures in SPEED["models"].items()}  # type: ignore[attr-defined]
    write_speed(layout.evaluation, SPEED | {"busy": True, "models": models})
    write_report(run.config(truth=False), [layout])
    said = "measured on a busy machine, where five rounds differ (teacher by 46 %, student by 46 %): compare no speeds"
    assert said in capsys.readouterr().out
    assert said[1:] in (Path(layout.run_dir) / "report.html").read_text()
    write_speed(layout.evaluation, SPEED)  # of an earlier version
    write_report(run.config(truth=False), [layout])
    assert "busy machine" not in capsys.readouterr().out


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
