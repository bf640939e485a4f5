"""The whole pipeline on real digits, through the command line, as a user runs it."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from data import storage
from pipeline.run import main
from tests import digits_run
from tests.conftest import WriteDigits, make_writer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, digits: digits_run.Digits) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits_run.write_digits_data(folder, digits[1], make_writer(digits))
    return folder


@pytest.fixture(scope="module")
def finished(data: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of all stages, and what it printed."""
    run_dir = data / "run"
    return run_dir, digits_run.run("stage=all", f"config={data}/config.yaml", f"run_dir={run_dir}")


def test_all_stages_run_and_the_summary_holds_their_figures(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, result = finished
    assert result.returncode == 0, result.stderr
    summary = digits_run.summary_of(run_dir)
    assert summary["student"]["top1"] > summary["teacher"]["top1"] > 0.65
    assert summary["teacher"]["images"] == 600
    assert summary["student"]["parameters"] > summary["teacher"]["parameters"]
    assert summary["labels"]["images"] == summary["labels"]["labels"] == digits_run.NUM_UNLABELED
    assert summary["labels"]["kept_right"] >= summary["labels"]["labels_right"] > 0.65
    assert all(summary[role]["robustness"]["images"] == 40 for role in ("teacher", "student"))
    assert all(summary["speed"]["models"][role]["images_per_s"] > 0 for role in ("teacher", "student"))
    assert set(summary["seconds"]) == {"teacher", "label", "select", "student", "evaluate"}


def test_the_end_shows_a_table_and_the_report(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, result = finished
    assert f"{digits_run.summary_of(run_dir)['student']['top1']:.2%}".rstrip("%") in result.stdout.replace(" %", "")
    assert str(run_dir / "report.html") in result.stdout
    assert "digit_3" in (run_dir / "report.html").read_text()


def test_progress_in_a_file_is_whole_lines(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, result = finished
    assert "\r" not in result.stderr
    assert re.search(r"^teacher: ([\d,]+) of \1 steps \(100 %\) in [\d:]+, [\d.,]+ steps/s", result.stderr, re.M)
    assert re.search(r"^label 100 %, ([\d,]+) of \1 images, ", result.stderr, re.M)


def test_the_quota_is_exact_for_every_class(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = finished
    name = (run_dir / "gen-1/selections/current").read_text().strip()
    selection = json.loads((run_dir / "gen-1/selections" / name / "selection.json").read_text())
    assert selection["totals"]["copies"] + selection["totals"]["shortfall"] == 600
    assert all(entry["kept"] <= 60 for entry in selection["classes"])


def test_the_weights_load_in_timm_and_name_their_classes(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    import timm

    run_dir, _ = finished
    model = timm.create_model(f"local-dir:{run_dir}/gen-1/student/weights", pretrained=True)
    config = json.loads((run_dir / "gen-1/student/weights/config.json").read_text())
    assert model.num_classes == 10
    assert config["label_names"][7] == "digit_7"
    assert config["noisy_student"]["validation_top1"] > 0.65


@pytest.mark.slow
def test_the_student_teaches_the_next_generation(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    first, _ = finished
    run_dir = data / "generations"
    shutil.copytree(first, run_dir)
    result = digits_run.run("stage=all", f"config={data}/config.yaml", f"run_dir={run_dir}", "generations=2")
    assert result.returncode == 0, result.stderr
    student = json.loads((run_dir / "gen-1/student/done.json").read_text())
    labels = json.loads((run_dir / "gen-2/labels/manifest.json").read_text())
    assert labels["teacher"]["digest"] == student["digest"]
    assert labels["generation"] == 2
    weights = json.loads((run_dir / "gen-2/student/weights/config.json").read_text())
    assert weights["noisy_student"]["generation"] == 2
    assert not (run_dir / "gen-2/teacher").exists()


def test_run_again_everything_is_done_and_nothing_changes(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    run_dir, _ = finished
    files = [f for f in run_dir.rglob("*.*") if f.is_file() and "gen-1" in f.parts]
    before = {f: f.stat().st_mtime_ns for f in files}
    result = digits_run.run("stage=all", f"config={data}/config.yaml", f"run_dir={run_dir}")
    assert result.returncode == 0, result.stderr
    assert {f: f.stat().st_mtime_ns for f in files} == before


@pytest.mark.slow
def test_a_changed_field_is_refused_by_name_and_leaves_the_run_as_it_was(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, _ = finished
    before = (run_dir / "config.yaml").read_bytes()
    result = digits_run.run("stage=all", f"run_dir={run_dir}", "teacher.epochs=3", "teacher.warmup_epochs=1")
    assert result.returncode == 2
    assert "teacher.epochs: 48.0 there, 3.0 now" in result.stderr
    assert "Traceback" not in result.stderr
    assert (run_dir / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_another_selection_touches_no_label_and_is_what_the_student_would_use(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run_dir, _ = finished
    labels = {f: f.stat().st_mtime_ns for f in (run_dir / "gen-1/labels").iterdir()}
    first = (run_dir / "gen-1/selections/current").read_text()
    result = digits_run.run("stage=select", f"run_dir={run_dir}", "select.per_class=20")
    assert result.returncode == 0, result.stderr
    assert {f: f.stat().st_mtime_ns for f in (run_dir / "gen-1/labels").iterdir()} == labels
    assert (run_dir / "gen-1/selections/current").read_text() != first
    refused = digits_run.run("stage=student", f"run_dir={run_dir}")
    assert refused.returncode == 2
    assert "select.per_class: 60 there, 20 now" in refused.stderr
    assert "stage=select select.per_class=60" in refused.stderr
    back = digits_run.run("stage=select", f"run_dir={run_dir}", "select.per_class=60")
    assert back.returncode == 0
    assert (run_dir / "gen-1/selections/current").read_text() == first


@pytest.mark.slow
def test_status_and_plan_answer_and_run_nothing(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    run_dir, _ = finished
    status = digits_run.run("stage=status", f"run_dir={run_dir}")
    assert status.returncode == 0, status.stderr
    stages = [line.split()[3] for line in status.stdout.splitlines() if line.startswith("generation")]
    assert stages[:5] == ["done"] * 5
    assert "    as the teacher labels: top-1" in status.stdout
    assert "CHANCE" not in status.stdout
    plan = digits_run.run("stage=all", f"config={data}/config.yaml", f"run_dir={data}/other", "plan=true")
    assert plan.returncode == 0, plan.stderr
    assert "900 images" in plan.stdout
    assert not storage.exists(f"{data}/other/gen-1")


@pytest.mark.parametrize(
    ("words", "states", "reason"),
    [
        ("stage=all", "done done done done done", ""),
        ("stage=all teacher.lr=3", "refuse done done done done", "teacher.lr: 4.0 there, 3.0 now"),
        (
            "stage=all select.per_class=25",
            "done done run refuse done",
            "made from inputs that stage=select will replace",
        ),
        ("stage=student select.per_class=20", "refuse", "Run stage=select first"),
        ("stage=all MORE", "done continue run refuse done", "1 of 7 shards are new"),
        ("stage=label force=true", "over run", "moves the output that is there aside"),
        ("stage=all generations=2", "done done done done done done run run run run", ""),
    ],
)
def test_the_plan_of_a_finished_run_says_what_each_stage_would_do(
    data: Path,
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    write_digits: WriteDigits,
    capsys: pytest.CaptureFixture[str],
    words: str,
    states: str,
    reason: str,
) -> None:
    run_dir, _ = finished
    if not (data / "plan").exists():
        write_digits(data / "plan", 1100, 1180, labeled=False)
    grown = f"data.unlabeled=[{data}/unlabeled/*.tar,{data}/plan/*.tar]"
    before = {f: f.stat().st_mtime_ns for f in run_dir.rglob("*")}
    assert main([*words.replace("MORE", grown).split(), f"run_dir={run_dir}", "plan=true"]) == 0
    printed = capsys.readouterr().out
    found = [line[24:42].split()[-1] for line in printed.splitlines() if line.startswith("generation")]
    assert found == states.split()
    assert reason in printed
    assert {f: f.stat().st_mtime_ns for f in run_dir.rglob("*")} == before


def test_the_plan_says_what_a_lost_output_or_a_first_run_needs(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = finished
    run_dir = data / "lost"
    shutil.copytree(first, run_dir)
    (run_dir / "gen-1/student/metrics.jsonl").unlink()
    assert main(["stage=student,evaluate", f"run_dir={run_dir}", "plan=true"]) == 0
    lost = capsys.readouterr().out
    assert "student   would continue" in lost
    assert "metrics.jsonl is missing or has another size" in lost
    (run_dir / "gen-1/labels/unlabeled-000002.parquet").unlink()
    assert main(["stage=label,student,evaluate", f"run_dir={run_dir}", "plan=true"]) == 0
    printed = capsys.readouterr().out
    assert "1 of 6 shards are new, changed or without labels" in printed
    assert "select    done" in printed
    assert "refuse" not in printed, "the same labels are made again"
    assert main(["stage=label", f"config={data}/config.yaml", f"run_dir={data}/fresh", "plan=true"]) == 0
    assert "stage teacher is not done; run stage=teacher first" in capsys.readouterr().out


def test_evaluation_alone_prints_accuracies_and_who_is_better(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (finished[0] / "report.html").read_bytes()
    assert main(["stage=evaluate", f"run_dir={finished[0]}"]) == 0
    printed = capsys.readouterr().out
    summary = digits_run.summary_of(finished[0])
    assert all(f"{100 * summary[role]['top1']:.2f} %" in printed for role in ("teacher", "student"))
    assert re.search(r"[Tt]he student is .* points .*the teacher", printed)
    assert "report: " not in printed
    assert (finished[0] / "report.html").read_bytes() == page


def test_test_shards_without_labels_leave_the_figures_that_are_there(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = data / "mistaken"
    shutil.copytree(finished[0], run_dir)
    assert main(["stage=evaluate", f"run_dir={run_dir}", f"data.test=[{data}/unlabeled/*.tar]"]) == 2
    assert "no .cls member" in capsys.readouterr().err
    assert (run_dir / "gen-1/evaluation/done.json").exists()


@pytest.mark.slow
def test_new_shards_are_labeled_and_old_labels_kept(
    data: Path, finished: tuple[Path, subprocess.CompletedProcess[str]], write_digits: WriteDigits
) -> None:
    run_dir, _ = finished
    labels = run_dir / "gen-1/labels"
    before = {f.name: f.read_bytes() for f in labels.glob("unlabeled-*.parquet")}
    write_digits(data / "more", 1100, 1180, labeled=False)
    grown = f"data.unlabeled=[{data}/unlabeled/*.tar,{data}/more/*.tar]"
    result = digits_run.run("stage=label", f"run_dir={run_dir}", grown)
    assert result.returncode == 0, result.stderr
    assert "1 of 7 shards" in result.stdout
    assert {f.name: f.read_bytes() for f in labels.glob("unlabeled-*.parquet")} == before
    assert (labels / "more-000000.parquet").exists()
