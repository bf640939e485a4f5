"""A run directory that an earlier version finished stays valid: nothing is made again, and everything can be read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data.labels import PseudoLabels
from pipeline.inference.weights_card import write_again
from pipeline.run import main
from tests.pipeline.earlier_run import RUN, unpack_earlier_run


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_earlier_run(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(autouse=True)
def _there(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(earlier)


def digests() -> dict[str, str]:
    files = sorted(path for path in Path(RUN, "gen-1").rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_its_stages_are_done_and_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    before = digests()
    assert main(["stage=teacher,label,student,evaluate", f"run_dir={RUN}"]) == 0
    printed = capsys.readouterr().out
    for stage in ("teacher", "label", "select", "student", "evaluate"):
        assert f"{stage}: done ({RUN}/gen-1/" in printed
    assert digests() == before


def test_its_stages_stay_done_with_other_intervals_of_measuring_and_logging(capsys: pytest.CaptureFixture[str]) -> None:
    before = digests()
    words = ["teacher.log_every_steps=7", "student.log_every_steps=9", "teacher.eval_every_epochs=0.5"]
    assert main(["stage=teacher,label,student,evaluate", f"run_dir={RUN}", *words]) == 0
    printed = capsys.readouterr().out
    assert all(f"{stage}: done" in printed for stage in ("teacher", "label", "select", "student", "evaluate"))
    assert digests() == before


def test_status_and_plan_call_it_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=status", f"run_dir={RUN}"]) == 0
    stages = [line.split()[2:4] for line in capsys.readouterr().out.splitlines() if line.startswith("generation 1")]
    assert stages == [[name, "done"] for name in ("teacher", "label", "select", "student", "evaluate")]
    assert main(["stage=all", f"run_dir={RUN}", "plan=true"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("done") >= 5
    assert "refuses" not in printed


def test_its_labels_are_read_selected_again_and_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert PseudoLabels(RUN).table().num_rows == 30  # 15 of each of the two classes that this teacher knows
    assert main(["stage=select", f"run_dir={RUN}", "select.per_class=5"]) == 0
    assert PseudoLabels(RUN).table().num_rows == 10
    assert main(["stage=select", f"run_dir={RUN}", "select.per_class=15"]) == 0
    assert main(["stage=export", f"run_dir={RUN}", "export.format=parquet"]) == 0
    assert Path(RUN, "exports/v1/README.md").exists()
    capsys.readouterr()


def test_its_weights_get_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    for role in ("teacher", "student"):
        folder = f"{RUN}/gen-1/{role}/weights"
        write_again(folder)
        assert "| test images |" in Path(folder, "README.md").read_text()
    assert main(["stage=teacher,student,evaluate", f"run_dir={RUN}"]) == 0
    assert "student: done" in capsys.readouterr().out


def test_its_report_is_written() -> None:
    assert main(["stage=report", f"run_dir={RUN}"]) == 0
    assert Path(RUN, "report.html").stat().st_size > 50_000
