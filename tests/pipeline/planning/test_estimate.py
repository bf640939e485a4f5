"""What a plan says of time: arithmetic of images and FLOPs, and a calibration that times this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.shards.split import open_split
from pipeline.core.schema import Config, TrainConfig
from pipeline.planning import estimate
from pipeline.planning.estimate import Workload, print_estimate, size_of
from pipeline.run import main
from tests.conftest import WriteDigits

SMALL = TrainConfig(
    model="resnetrs50", model_args={"width": 0.25, "blocks": [1, 1, 1, 1]}, image_size=32, batch_size=16
)
LARGE = TrainConfig(model="resnetrs152", image_size=256)


def table(printed: str) -> dict[str, list[str]]:
    """Cells by row of the printed table, two spaces or more between them."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 5}


def test_gpus_take_the_published_time_of_the_published_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_measured", lambda work, config: 1.0)
    works = [
        Workload("student", 282 * 8 * 60, True, LARGE, 1000),
        Workload("label", 2029 * 64 * 50, False, LARGE, 1000),
    ]
    print_estimate(Config(device="cpu"), works, None)
    rows = table(capsys.readouterr().out)
    assert rows["student"][1:] == ["8 min 0 s", "60.0 s", "7.5 s"]
    assert rows["label"][1:] == ["53 min 20 s", "6 min 40 s", "50.0 s"]
    assert rows["label"][0] == "75.1 days"  # one image per second here


def test_a_model_with_twice_the_flops_takes_twice_as_long() -> None:
    smaller = LARGE.model_copy(update={"image_size": 192})
    ratio = size_of(LARGE, 1000)[1] / size_of(smaller, 1000)[1]
    assert 1.7 < ratio < 1.85  # (256 / 192) ** 2
    speeds = [estimate._on_gpu(Workload("label", 1, False, section, 1000)) for section in (smaller, LARGE)]
    assert speeds[0] / speeds[1] == pytest.approx(ratio)


def test_this_machine_is_timed_and_training_takes_longer_than_labeling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_MEASURE_S", 0.2)
    config = Config(device="cpu", threads=1)
    labels, trains = (estimate._measured(Workload("x", 1, trains, SMALL, 10), config) for trains in (False, True))
    assert 0 < trains < labels < 1e6


def test_a_model_too_large_to_be_tried_is_scaled_from_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def timing(section: TrainConfig, *_: object) -> float:
        timed.append(section.model)
        return 12.0

    monkeypatch.setattr(estimate, "_timed", timing)
    speed = estimate._measured(Workload("label", 1, False, LARGE, 1000), Config(device="cpu"))
    assert timed == ["resnetrs50"]
    stand_in = TrainConfig(model="resnetrs50", image_size=160)
    assert speed == pytest.approx(12.0 * size_of(stand_in, 1000)[1] / size_of(LARGE, 1000)[1])


def test_decoding_is_timed_with_images_of_the_users(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_MEASURE_S", 0.1)
    monkeypatch.setattr(estimate, "_measured", lambda work, config: 1.0)
    write_digits(tmp_path / "unlabeled", 0, 50, labeled=False)
    split = open_split([f"{tmp_path}/unlabeled/*.tar"], str(tmp_path / "index"))
    print_estimate(Config(device="cpu"), [Workload("label", 50, False, SMALL, 10)], split)
    printed = capsys.readouterr().out
    assert re.search(r"decoding: [\d,]+ images/s per core .* on 1, 8, 64 GPUs: [\d,]+, [\d,]+, [\d,]+ cores", printed)
    (tmp_path / "unlabeled/unlabeled-000000.tar").unlink()
    print_estimate(Config(device="cpu"), [Workload("label", 50, False, SMALL, 10)], split)
    assert "decoding: not timed" in capsys.readouterr().out


def test_a_plan_without_work_for_a_model_estimates_nothing(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path / "unlabeled", 0, 50, labeled=False)
    words = [
        f"run_dir={tmp_path}/run",
        f"data.unlabeled=[{tmp_path}/unlabeled/*.tar]",
        "data.num_classes=3",
        "plan=true",
    ]
    assert main(["stage=select", *words]) == 0
    assert "time of the models" not in capsys.readouterr().out
