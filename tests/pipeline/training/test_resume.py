"""kill -9 in each stage, then the same command: the run finishes, and labels and selection are the same bytes."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.core.timing import read_timing
from pipeline.inference.stage_weights import read_info
from tests import HANGS_S, digits_run
from tests.conftest import make_writer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: digits_run.Digits) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    digits_run.write_digits_data(folder, digits[1], make_writer(digits))
    return folder


def words(data: Path, name: str) -> list[str]:
    # one step between checkpoints, and an epoch budget small enough for a test that runs the pipeline several times
    small = ["teacher.epochs=12", "student.epochs=12", "teacher.checkpoint_every_s=0", "student.checkpoint_every_s=0"]
    small += ["student.fix_resolution_epochs=6", "student.fix_resolution_image_size=20"]
    return ["stage=all", f"config={data}/config.yaml", f"run_dir={data}/{name}", *small]


def stop_when(condition: Callable[[], bool], number: signal.Signals, command: list[str]) -> tuple[int, str]:
    """Run a command, send it a signal as soon as the condition holds, and return its exit code and errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        deadline = time.monotonic() + HANGS_S
        while not condition():
            assert process.poll() is None, f"the command ended before it could be stopped: {process.communicate()[1]}"
            assert time.monotonic() < deadline, "what should have stopped the command never came"
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=HANGS_S)
        return process.returncode, errors


def moments(run_dir: Path) -> Iterator[Callable[[], bool]]:
    """Conditions that hold in the middle of teacher, label, select, student, fix_resolution and evaluate."""
    generation = run_dir / "gen-1"
    yield lambda: len(list((generation / "teacher/checkpoints").glob("step-*.pt"))) > 1
    yield lambda: any((generation / "labels").glob("unlabeled-*.parquet"))
    yield lambda: any((generation / "selections").glob("*/started.json"))
    yield lambda: len(list((generation / "student/checkpoints").glob("step-*.pt"))) > 1
    yield lambda: len(list((generation / "student/fix_resolution/checkpoints").glob("step-*.pt"))) > 1
    yield lambda: (generation / "evaluation/started.json").exists()


@pytest.mark.slow
def test_killed_in_every_stage_the_same_command_finishes_with_the_same_labels(data: Path) -> None:
    command = digits_run.command(*words(data, "broken"))
    for moment in moments(data / "broken"):
        code, _ = stop_when(moment, signal.SIGKILL, command)
        assert code == -signal.SIGKILL
    finished = digits_run.run(*words(data, "broken"))
    assert finished.returncode == 0, finished.stderr
    whole = digits_run.run(*words(data, "whole"))
    assert whole.returncode == 0, whole.stderr
    assert digits_run.label_and_selection_bytes(data / "broken") == digits_run.label_and_selection_bytes(data / "whole")
    for model in ("teacher", "student"):
        parts = [
            (data / name / f"gen-1/{model}/weights/model.safetensors").read_bytes() for name in ("broken", "whole")
        ]
        assert parts[0] == parts[1], f"the {model}'s weights differ"
    sizes = [read_info(str(data / "broken/gen-1" / model)).image_size for model in ("teacher", "student")]
    assert sizes == [16, 20], "the student's resolution is fixed for 20 px"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_makes_it_save_print_how_to_continue_and_exit_non_zero(data: Path, number: signal.Signals) -> None:
    name = f"stopped-{number.name}"
    run_dir = data / name
    code, errors = stop_when(next(moments(run_dir)), number, digits_run.command(*words(data, name)))
    assert code == 128 + number
    assert "To continue, the same command again" in errors
    assert f"run_dir={run_dir}" in errors
    assert "Traceback" not in errors
    assert read_timing(str(run_dir / "gen-1/teacher")).seconds > 0
