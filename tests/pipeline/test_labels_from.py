"""Two students of one set of labels: the second run takes teacher and labels of the first and changes nothing there; its teacher is
not evaluated again."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import chdir
from pathlib import Path

import pytest

from pipeline.run import main
from tests.pipeline.earlier_run import RUN as OLD
from tests.pipeline.earlier_run import unpack_earlier_run

NEW = "runs/new"
STUDENT = ("student.epochs=2", "student.warmup_epochs=1", "student.eval_every_epochs=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the first run, which an earlier version finished; evaluated here, as another kind of CPU rounds differently."""
    folder = unpack_earlier_run(tmp_path_factory.mktemp("labels_from"))
    with chdir(folder):
        shutil.rmtree(f"{OLD}/gen-1/evaluation")
        assert main(["stage=evaluate", f"run_dir={OLD}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(words) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.out + captured.err


def digests(run_dir: str) -> dict[str, str]:
    files = sorted(path for path in Path(run_dir).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def evaluated(folder: str = f"{NEW}/gen-1/evaluation") -> tuple[bytes, bytes]:
    return Path(folder, "predictions.parquet").read_bytes(), Path(folder, "done.json").read_bytes()


def test_what_cannot_be_taken_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "labels_from=runs/none: no run there" in run(
        capsys, "stage=student", "run_dir=runs/x", "labels_from=runs/none", code=2
    )
    assert "is this run itself" in run(capsys, "stage=student", f"run_dir={OLD}", f"labels_from={OLD}", code=2)
    words = ("run_dir=runs/x", f"labels_from={OLD}")
    assert "labels_from=runs/old made it; start it over there" in run(
        capsys, "stage=label", "force=true", *words, code=2
    )
    assert "the labels are those of labels_from" in run(capsys, "stage=label", "verify=true", *words, code=2)
    refused = run(capsys, "stage=label", "label.views=2", *words, code=2)
    assert "label.views: 1 there, 2 now" in refused
    assert not Path("runs/x/gen-1").exists()


@pytest.mark.slow
def test_a_second_student_of_the_same_labels_leaves_the_first_run_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(OLD)
    printed = run(capsys, "stage=all", f"run_dir={NEW}", f"labels_from={OLD}", *STUDENT)
    assert f"teacher: taken from {OLD}/gen-1/teacher" in printed
    assert f"label: taken from {OLD}/gen-1/labels" in printed
    assert f"the teacher was evaluated on these images in {OLD}/gen-1/evaluation" in printed
    assert digests(OLD) == before
    assert not Path(NEW, "gen-1/labels").exists()
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in (OLD, NEW)]
    assert summaries[0]["teacher"] == summaries[1]["teacher"]
    assert f"{NEW}/report.html" in printed
    figures = evaluated()
    again = run(capsys, "stage=evaluate", f"run_dir={NEW}", "force=true")
    assert "was evaluated" not in again, "force=true measures all"
    assert evaluated() == figures, "what is taken equals what is measured"


@pytest.mark.slow
def test_the_command_again_finds_all_done_and_another_student_needs_no_labels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = run(capsys, "stage=student,evaluate", f"run_dir={NEW}")
    assert all(f"{stage}: done" in printed for stage in ("select", "student", "evaluate"))
    third = run(capsys, "stage=student", "run_dir=runs/third", f"labels_from={OLD}", *STUDENT, "student.lr=0.01")
    assert "label: taken" not in third, "stage=student makes its selection and itself"
    assert Path("runs/third/gen-1/selections/current").exists()
    refused = run(capsys, "stage=student", "run_dir=runs/fourth", f"labels_from={NEW}", code=2)
    assert f"that run has its labels from {OLD}; give labels_from={OLD}" in refused
    table = run(capsys, "stage=compare", f"runs=[{OLD},{NEW},runs/third]")
    assert "the same labels" in table
    assert "student.lr" in table


@pytest.mark.slow
def test_under_corruption_too_a_teacher_is_measured_once(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "stage=evaluate", f"run_dir={NEW}", "evaluate.robustness_images=4")
    first = json.loads(Path(NEW, "summary.json").read_text())
    student = run(capsys, "stage=student,evaluate", f"run_dir={NEW}", "seed=0", code=0)
    assert "evaluate: done" in student
    run(capsys, "stage=student", f"run_dir={NEW}", "force=true", "student.lr=0.02")
    printed = run(capsys, "stage=evaluate", f"run_dir={NEW}")
    assert "the teacher was evaluated on these images in" in printed
    figures, second = evaluated(), json.loads(Path(NEW, "summary.json").read_text())
    assert second["teacher"] == first["teacher"]
    assert second["student"] != first["student"]
    run(capsys, "stage=evaluate", f"run_dir={NEW}", "force=true")
    assert evaluated() == figures
