"""A student that is no clear gain: console and report say so first, then what to try, by the run's own figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.evaluation.outcome import Outcome, print_student, validation_outcome, what_to_try
from pipeline.report.build import REPORT_NAME, write_report
from teacher.selection.stage import select
from teacher.validation_labels import ValidationLabels
from tests.conftest import WriteDigits
from tests.small_run import NUM_TEST, SmallRun

FIELDS = {"student.unlabeled_ratio": 3, "student.batch_size": 40, "student.from_teacher": False}


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits) -> SmallRun:
    return SmallRun(tmp_path, write_digits)


def first(count: int) -> np.ndarray:
    return np.arange(NUM_TEST) < count


def validation(num_wrong: int) -> ValidationLabels:
    """200 images, all as sure; the first `num_wrong` labels are wrong."""
    true = np.arange(200, dtype=np.int32) % 10
    predicted = np.where(np.arange(200) < num_wrong, (true + 1) % 10, true).astype(np.int32)
    return ValidationLabels(true, predicted, np.full(200, 0.999, np.float32))


def change(folder: str, summary: dict[str, Any], fields: dict[str, Any] | None = None) -> None:
    """Change a done-record."""
    url = storage.join(folder, "done.json")
    record = json.loads(storage.read_text(url))
    record["summary"] |= summary
    record["fingerprint"]["config"] |= fields or {}
    storage.write_text(url, json.dumps(record))


def trained(run: SmallRun, num_wrong: int = 80, **options: Any) -> tuple[Config, Layout]:
    """A teacher of 62.5 % and a student of 60 % on 200 validation images, which learned from the present selection."""
    data = {"labeled": [f"{run.folder}/labeled/*.tar"], "unlabeled": [f"{run.folder}/unlabeled/*.tar"]}
    config = run.config(data=data, **options)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    change(layout.teacher, {"validation_images": 200})
    run.label(config, layout, validation=validation(num_wrong))
    selection = select(config, layout)
    run.model(layout.student, "student")
    change(layout.student, {"validation_top1": 0.6, "validation_images": 200, "steps": 10}, FIELDS)
    url = storage.join(layout.student, "done.json")
    record = json.loads(storage.read_text(url))
    record["fingerprint"]["inputs"]["selection"] = selection["digest"]
    storage.write_text(url, json.dumps(record))
    return config, layout


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [
        (0.05, 0.0156, "The student is 5.00 ± 1.56 points better than the teacher on 400 test images"),
        (-0.05, 0.0156, "The student is 5.00 ± 1.56 points worse than the teacher on 400 test images"),
        (-0.03, 0.0156, "No clear difference: the student is −3.00 ± 1.56 points from the teacher on 400 test images"),
        (0.0, 0.0, "No clear difference: the student is +0.00 ± 0.00 points from the teacher on 400 test images"),
    ],
)
def test_a_difference_is_clear_beyond_two_standard_errors(difference: float, error: float, verdict: str) -> None:
    found = Outcome("student", "teacher", difference, error, 400, "test")
    assert found.verdict() == verdict
    assert found.is_gain == ("better" in verdict)
    assert found.is_loss == ("worse" in verdict)


def test_validation_accuracies_are_compared_as_independent_ones() -> None:
    one, two = {"validation_top1": 0.5, "validation_images": 100}, {"validation_top1": 0.9, "validation_images": 100}
    found = validation_outcome("student", "teacher", one, two)
    assert found is not None
    assert (found.difference, found.images) == (pytest.approx(0.4), 100)
    assert found.error == pytest.approx(((0.25 + 0.09) / 100) ** 0.5)
    assert validation_outcome("student", "teacher", {"validation_top1": 0.5}, two) is None


def test_after_the_student_the_console_compares_it_with_its_teacher(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = trained(run)
    capsys.readouterr()
    print_student(config, layout)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "student: No clear difference: the student is −2.50 ± 4.87 points from the teacher on 200 validation images "
        "(± is one standard error)"
    )
    assert lines[1] == "What to try, by this run's figures:"
    change(layout.student, {"validation_top1": 0.9})
    print_student(config, layout)
    gain = capsys.readouterr().out
    assert "27.50 ± 4.03 points better" in gain
    assert "What to try" not in gain


def test_without_validation_images_the_console_says_that_nothing_is_known(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = trained(run)
    change(layout.student, {"validation_images": 0})
    capsys.readouterr()
    print_student(config, layout)
    assert capsys.readouterr().out == (
        "student: without validation images (data.validation), nothing says yet whether it is better than its teacher\n"
    )


def test_what_to_try_follows_from_the_figures(run: SmallRun) -> None:
    config, layout = trained(run)
    labels, number, weights, begin, longer, seeds = what_to_try(config, layout)
    assert labels.startswith("better labels: by validation, 6")
    assert "of the 79 kept labels are right" in labels
    assert "a better teacher: more labeled images" in labels
    assert number.startswith("more pseudo-labels: 79 of 117 are kept, for 120 labeled images")
    assert weights.startswith("first weights from elsewhere: 120 labeled images, 12 a class")
    assert begin == "a student that begins as its teacher: this one began with random weights (student.init=teacher)"
    copies = storage.join(str(layout.current_selection()), "selection.json")
    passes = 10 * 40 * 3 / 4 / json.loads(storage.read_text(copies))["totals"]["copies"]
    assert (
        longer
        == f"a longer training: the student saw each pseudo-label {passes:.1f} times in 10 steps (student.epochs)"
    )
    assert seeds.startswith("one training says little")


def test_what_does_not_apply_is_not_advised(run: SmallRun) -> None:
    config, layout = trained(run, num_wrong=0, select={"confidence_threshold": 0.3})
    change(layout.teacher, {"begun_with": "pretrained"})
    change(layout.student, {"steps": 10_000}, {"student.from_teacher": True})
    advice = "\n".join(what_to_try(config, layout))
    assert "better labels" not in advice
    assert "longer" not in advice
    assert "weights" not in advice


def test_a_student_from_random_weights_is_told_what_its_teacher_began_with(run: SmallRun) -> None:
    config, layout = trained(run)
    change(layout.teacher, {"begun_with": "pretrained"})
    advice = "\n".join(what_to_try(config, layout))
    assert "began with random weights, where the teacher began with pretrained (student.init=teacher)" in advice
    assert "first weights from elsewhere: " not in advice


def test_another_selection_than_the_students_is_not_blamed(run: SmallRun) -> None:
    config, layout = trained(run)
    storage.remove(str(layout.current_selection()))
    advice = "\n".join(what_to_try(config, layout))
    assert "kept" not in advice
    assert "times in" not in advice


def test_the_report_and_its_table_begin_with_the_loss(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, layout = trained(run)
    run.evaluate(layout, {"teacher": first(320), "student": first(280)})
    capsys.readouterr()
    write_report(config, [layout])
    verdict = "The student is 10.00 ± 1.50 points worse than the teacher on 400 test images"
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[:2] == [verdict, "What to try, by this run's figures:"]
    assert printed[2].startswith("  1. better labels: by validation")
    html = (Path(config.run_dir) / REPORT_NAME).read_text()
    assert html.index(verdict) < html.index("What to try") < html.index("Better labels") < html.index('class="tile')


def test_a_gain_needs_no_advice(run: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    config, layout = trained(run)
    run.evaluate(layout, {"teacher": first(280), "student": first(320)})
    write_report(config, [layout])
    assert "What to try" not in capsys.readouterr().out
    assert "What to try" not in (Path(config.run_dir) / REPORT_NAME).read_text()


def test_a_second_student_is_compared_with_both_and_a_loss_against_the_first_is_said(
    run: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    config, one = trained(run, generations=2)
    run.evaluate(one, {"teacher": first(280), "student": first(360)})
    two = Layout(config.run_dir, 2)
    run.label(config, two, validation=validation(80))
    select(config, two)
    run.model(two.student, "student")
    run.evaluate(two, {"teacher": first(360), "student": first(320)})
    capsys.readouterr()
    write_report(config, [one, two])
    printed = capsys.readouterr().out
    assert "Student 2 is 10.00 ± 1.50 points better than the teacher on 400 test images" in printed
    assert "Student 2 is 10.00 ± 1.50 points worse than student 1 on 400 test images, which labeled for it" in printed
    assert "What to try" in printed
    assert re.search(r"student 2 .* −10\.00 ± 1\.50 +\+10\.00 ± 1\.50\n", printed)
    assert "against its teacher, points  against the first teacher, points" in printed
    assert "± is one standard error of the paired difference" in printed
