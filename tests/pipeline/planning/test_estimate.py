"""What a plan says of time: arithmetic of images and FLOPs, and a calibration that times this machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shards.split import open_split
from pipeline.core.schema import Config, PretrainConfig, TrainConfig
from pipeline.models import expected_time
from pipeline.models.expected_time import (
    Workload,
    expected_seconds,
    gpu_images_per_s,
    gpu_seconds,
    images_per_s,
    size_of,
)
from pipeline.planning import estimate
from pipeline.planning.estimate import HostSpeeds, print_estimate
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


def training(images: int, section: TrainConfig, **changes: Any) -> Workload:
    return Workload("student", images, max(1, images // 64), True, section, 1000, 1, **changes)


def labeling(images: int, section: TrainConfig, **changes: Any) -> Workload:
    return Workload("label", images, max(1, images // 64), False, section, 1000, 1, **changes)


def test_gpus_take_the_published_time_of_the_published_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "expected_seconds", lambda work, device: float(work.images))
    works = [training(282 * 8 * 60, LARGE), labeling(2029 * 64 * 50, LARGE)]
    print_estimate(Config(device="cpu"), works, None)
    rows = table(capsys.readouterr().out)
    assert rows["student"][1:] == ["8 min 0 s", "60.0 s", "42.3 s"]  # 64 GPUs: 2,115 steps of 20 ms
    assert rows["label"][1:] == ["53 min 20 s", "6 min 40 s", "50.0 s"]
    assert rows["label"][0] == "75 days"  # one image per second here


def test_a_tiny_models_steps_take_as_long_as_their_launch_on_any_number_of_gpus() -> None:
    work = replace(training(128_000, SMALL), batches=1000)
    assert [gpu_seconds(work, number) for number in (1, 8, 64)] == pytest.approx([20, 20, 20])
    assert gpu_seconds(replace(work, trains=False), 8) == pytest.approx(1000 * 0.005 / 8)


def test_no_stage_takes_zero_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "expected_seconds", lambda work, device: 0.01)
    print_estimate(Config(device="cpu"), [labeling(64, SMALL)], None)
    assert table(capsys.readouterr().out)["label"] == ["under 1 s"] * 4


def test_a_stage_that_takes_days_here_comes_with_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "expected_seconds", lambda work, device: float(work.images))
    print_estimate(Config(device="cpu"), [training(4_000_000, LARGE)], None)
    printed = capsys.readouterr().out
    assert (
        "student: too long for this machine; give device=cuda on a machine with a GPU (3 h 56 min on one), or fewer"
        in printed
    )
    print_estimate(Config(device="cpu"), [training(4_000, LARGE)], None)
    assert "too long" not in capsys.readouterr().out


def test_what_would_take_months_here_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected_time, "_timed", None)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    print_estimate(Config(device="cpu"), [training(450_000_000, LARGE)], None)
    assert table(capsys.readouterr().out)["student"][0] == "over 30 days"


def test_a_model_with_twice_the_flops_takes_twice_as_long() -> None:
    smaller = LARGE.model_copy(update={"image_size": 192})
    ratio = size_of(LARGE, 1000)[1] / size_of(smaller, 1000)[1]
    assert 1.7 < ratio < 1.85  # (256 / 192) ** 2
    speeds = [gpu_images_per_s(labeling(64_000, section), 1) for section in (smaller, LARGE)]
    assert speeds[0] / speeds[1] == pytest.approx(ratio)


def test_this_machine_is_timed_and_training_takes_longer_than_labeling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expected_time, "_MEASURE_S", 0.2)
    labels, trains = (images_per_s(work, "cpu") for work in (labeling(1, SMALL), training(1, SMALL)))
    assert 0 < trains < labels < 1e6


def test_models_that_take_equally_long_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[object] = []

    def timing(call: object) -> float:
        timed.append(call)
        return 5.0

    monkeypatch.setattr(expected_time, "calls_per_s", timing)
    sections = [SMALL.model_copy(update={"image_size": 48, "dropout": rate, "epochs": 3.0}) for rate in (0.0, 0.1, 0.2)]
    assert {images_per_s(training(64, section), "cpu") for section in sections} == {5.0 * 16}
    assert len(timed) == 1


def test_loading_beside_the_model_counts_where_it_is_slower_and_shares_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expected_time, "_timed", lambda *_: 10.0)  # images/s of a process
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    work = training(1000, SMALL)
    assert expected_seconds(work, "cpu") == pytest.approx(100)
    assert expected_seconds(replace(work, loading_s=80.0), "cpu") == pytest.approx(100)
    assert expected_seconds(replace(work, loading_s=300.0), "cpu") == pytest.approx(300)
    assert expected_seconds(replace(work, loading_s=300.0, loaders=2), "cpu") == pytest.approx(150)
    assert expected_seconds(replace(work, loading_s=300.0, loaders=0), "cpu") == pytest.approx(400)
    assert expected_seconds(replace(work, loading_s=700.0, loaders=8), "cpu") == pytest.approx(200)  # 4 cores
    assert expected_seconds(replace(work, processes=2), "cpu") == pytest.approx(50)


def test_a_model_too_large_to_be_tried_is_scaled_from_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def timing(section: TrainConfig, *_: object) -> float:
        timed.append(section.model)
        return 12.0

    monkeypatch.setattr(expected_time, "_timed", timing)
    speed = images_per_s(labeling(1, LARGE), "cpu")
    assert timed == ["resnetrs50"]
    stand_in = TrainConfig(model="resnetrs50", image_size=160)
    assert speed == pytest.approx(12.0 * size_of(stand_in, 1000)[1] / size_of(LARGE, 1000)[1])


def test_decoding_is_timed_with_images_of_the_users(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expected_time, "_MEASURE_S", 0.1)
    monkeypatch.setattr(estimate, "expected_seconds", lambda work, device: 1.0)
    write_digits(tmp_path / "unlabeled", 0, 50, labeled=False)
    splits = {"unlabeled": open_split([f"{tmp_path}/unlabeled/*.tar"], str(tmp_path / "index"))}
    config, works = Config(device="cpu"), [labeling(50, SMALL)]
    print_estimate(config, works, HostSpeeds(config, splits).decoded_per_s)
    printed = capsys.readouterr().out
    assert re.search(
        r"decoding: [\d,]+ images/s per core .* 1, 8, 64 GPUs busy with [\d,]+, [\d,]+, [\d,]+ cores", printed
    )
    (tmp_path / "unlabeled/unlabeled-000000.tar").unlink()
    print_estimate(config, works, HostSpeeds(config, splits).decoded_per_s)
    assert "decoding: not timed" in capsys.readouterr().out


def test_loading_is_timed_with_the_labeled_images_once_for_trainings_that_load_alike(
    tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_digits(tmp_path / "labeled", 0, 20)
    labeled = open_split([f"{tmp_path}/labeled/*.tar"], str(tmp_path / "index"))
    speeds = HostSpeeds(Config(), {"labeled": labeled})
    assert speeds.loading_s(SMALL) > 0
    assert speeds.loading_s(SMALL) == speeds.loading_s(SMALL.model_copy(update={"epochs": 3.0, "dropout": 0.3}))
    assert speeds.loading_s(PretrainConfig(image_size=32)) > 0
    (tmp_path / "labeled/labeled-000000.tar").unlink()
    assert speeds.loading_s(SMALL.model_copy(update={"image_size": 40})) == 0  # not known


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
    assert "expected time" not in capsys.readouterr().out
