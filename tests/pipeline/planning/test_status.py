"""What people see of a run from another terminal: how far it is, who works on it, what stopped it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.lock import run_lock
from pipeline.core.schema import Config
from pipeline.planning import status
from pipeline.planning.status import note_stop, print_status, watch_status
from pipeline.run import main
from pipeline.stages import with_folder
from pipeline.training.progress import RecentRate, TrainingDisplay, TrainingProgress, read_training_progress
from tests.conftest import Clock, WriteDigits
from tests.small_run import SmallRun

SOME = TrainingProgress(120, 500, 380.0, 70, 0.5312, 1)


@pytest.fixture
def begun(tmp_path: Path, write_digits: WriteDigits) -> tuple[Config, Layout]:
    """A run whose teacher is done and whose student is begun."""
    run = SmallRun(tmp_path, write_digits)
    config = run.config(truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher", seconds=754)
    storage.write_text(f"{layout.student}/started.json", json.dumps({"fingerprint": {"config": {}, "inputs": {}}}))
    return config, layout


def lines(config: Config, layout: Layout, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    print_status(config, [layout])
    return capsys.readouterr().out.splitlines()


def test_progress_of_a_training_is_told_in_words(
    begun: tuple[Config, Layout], capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = begun
    values = replace(SOME, written_at=time.time()).__dict__
    storage.write_text(f"{layout.student}/progress.json", json.dumps(values))
    shown = lines(config, layout, capsys)
    assert shown[0].split(maxsplit=3)[3].split() == ["done", "12", "min", "34", "s", layout.teacher]
    assert shown[1].split()[2:] == ["label", "not", "begun"]
    assert shown[3].endswith("begun       step 120 of 500 (24 %), 380 img/s, 01:10 left, loss 0.531")
    storage.write_text(f"{layout.student}/progress.json", json.dumps(values | {"written_at": time.time() - 125}))
    assert lines(config, layout, capsys)[3].endswith("loss 0.531; as of 02:05 ago")


def test_who_works_on_a_run_is_named_and_a_process_that_is_gone_is_not(
    begun: tuple[Config, Layout], capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = begun
    with run_lock(config.run_dir, "the command"):
        assert lines(config, layout, capsys)[-1].startswith(f"at work: process {os.getpid()} on ")
        holder = json.loads(storage.read_text(f"{config.run_dir}/lock.json"))
    assert not any("at work" in line for line in lines(config, layout, capsys))
    storage.write_text(
        f"{config.run_dir}/lock.json", json.dumps(holder | {"pid": 2**22 + 1})
    )  # killed: nobody removed it
    assert not any("at work" in line for line in lines(config, layout, capsys))


def test_what_stopped_a_run_is_told_until_the_stage_is_done(
    begun: tuple[Config, Layout], capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = begun
    note_stop(config.run_dir, "student", ValueError("the loss is nan at step 7"))
    assert lines(config, layout, capsys)[-1].startswith("stopped 00:0")
    assert "in stage student: ValueError: the loss is nan at step 7" in lines(config, layout, capsys)[-1]
    secret = "https://me:hunter2@store/x.tar?X-Amz-Signature=abc"
    note_stop(config.run_dir, "student", ValueError(f"{secret} is not there"))
    with run_lock(config.run_dir, f"python -m pipeline.run data.test=[{secret}]"):
        kept = [storage.read_text(f"{config.run_dir}/{name}") for name in ("lock.json", "last_stop.json")]
    assert all("//***@store/x.tar?X-Amz-Signature=***" in text for text in kept)
    note_stop(config.run_dir, "student", None)
    assert not any(line.startswith("stopped") for line in lines(config, layout, capsys))


def test_the_command_notes_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage.write_text(f"{tmp_path}/run/config.yaml", "seed: 0\n")
    assert main(["stage=label", f"run_dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.strip().removeprefix("error: ")
    assert main(["stage=status", f"run_dir={tmp_path}/run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "in stage label" in last
    assert error[:80] in last


def test_watching_ends_when_all_is_done(
    begun: tuple[Config, Layout], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout = begun
    waits: list[float] = []

    def finish(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 3
        if len(waits) == 2:
            record = storage.read_text(f"{layout.teacher}/done.json")
            for row in with_folder():
                storage.write_text(f"{layout.folder_of(row.name)}/done.json", record)

    monkeypatch.setattr(status.time, "sleep", finish)
    watch_status(config)
    assert waits == [status.WATCH_S] * 2
    printed = capsys.readouterr().out
    assert printed.count("generation 1  student   begun") == 2
    assert "generation 1  student   done" in printed
    assert "\033" not in printed  # no terminal to clear


def test_only_the_status_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=teacher", f"run_dir={tmp_path}", "watch=true"]) == 2
    assert "watch=true goes with stage=status" in capsys.readouterr().err


def test_a_rate_is_that_of_the_last_two_minutes(clock: Clock) -> None:
    rate = RecentRate()
    assert rate(0) == 0
    for step in range(1, 101):
        clock.now += 1
        recent = rate(10 * step)
    assert recent == pytest.approx(10)
    for step in range(1, 301):
        clock.now += 1
        recent = rate(1000 + step)
    assert recent == pytest.approx(1)


def test_a_training_writes_how_far_it_is_every_few_seconds(tmp_path: Path, clock: Clock) -> None:
    folder = str(tmp_path)
    with TrainingDisplay(
        folder, "student", step=10, total_steps=110, images_per_step=32, workers=2, shown=True
    ) as display:
        for step in range(11, 31):
            clock.now += 0.5
            display.show(step, 1.0 / step)
    progress = read_training_progress(folder)
    assert progress is not None
    assert progress.written_at > 0
    assert replace(progress, written_at=0) == TrainingProgress(21, 110, 64.0, 44, 1 / 21, 2)
    with TrainingDisplay(
        folder, "student", step=30, total_steps=110, images_per_step=32, workers=2, shown=False
    ) as other:
        clock.now += 100
        other.show(31, 0.0)
    assert read_training_progress(folder) == progress
