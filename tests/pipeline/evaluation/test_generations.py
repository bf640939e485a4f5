"""generations=auto: goes on while the student beats its teacher on the validation images, stops by its rule, continues after a kill."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.storage.failpoint import VARIABLE
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.evaluation.decide import decide
from pipeline.evaluation.generations import (
    Decision,
    all_layouts,
    describe_best,
    known_layouts,
    read_decision,
    summarize,
)
from pipeline.inference.accuracy import paired_comparison
from pipeline.planning.status import print_status
from pipeline.report.build import report_html
from pipeline.report.facts import read_facts
from tests import digits_run
from tests.conftest import WriteDigits, make_writer
from tests.small_run import SmallRun


def rights(gained: int, lost: int, number: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """A teacher and a student on `number` images, of which both have half of the rest right."""
    teacher, student = np.zeros(number, bool), np.zeros(number, bool)
    student[:gained] = True
    teacher[gained : gained + lost] = True
    both = (number - gained - lost) // 2
    teacher[gained + lost : gained + lost + both] = student[gained + lost : gained + lost + both] = True
    return teacher, student


def decision(gained: int, lost: int) -> Decision:
    teacher, student = rights(gained, lost)
    return Decision(float(teacher.mean()), float(student.mean()), paired_comparison(teacher, student))


@pytest.mark.parametrize(
    ("gained", "lost", "goes_on"),
    [
        (20, 5, True),  # 15 ± 4.8 points
        (12, 8, False),  # 4 ± 4.5
        (1, 0, True),  # 1 ± 0.995: one image of which the other has none
        (0, 0, False),
        (5, 20, False),
    ],
)
def test_another_generation_needs_a_gain_of_more_than_its_standard_error(gained: int, lost: int, goes_on: bool) -> None:
    assert decision(gained, lost).goes_on == goes_on


def test_a_decision_is_said_with_its_figures_and_its_reason() -> None:
    said = decision(20, 5).describe(2, 3)
    assert said == (
        "generation 2: student 57.00%, teacher 42.00% on 100 validation images, +15.00 ± 4.77 points: "
        "more than 1 standard error, so generation 3 follows"
    )
    assert decision(20, 5).describe(3, 3).endswith("more than 1 standard error, but max_generations=3")
    assert decision(12, 8).describe(1, 3).endswith("not more than 1 standard error, so this is the last")


class AutoRun(SmallRun):
    """A run of generations=auto whose models have right what a test says."""

    def __init__(self, folder: Path, write: WriteDigits) -> None:
        super().__init__(folder, write)
        write(folder / "validation", 200, 300)
        data = {"validation": [f"{folder}/validation/*.tar"], "test": [f"{folder}/no/test/images.tar"]}
        self.auto = Config.model_validate(
            self.config(generations=2).model_dump() | {"generations": "auto", "data": data}
        )

    def layout(self, generation: int) -> Layout:
        return all_layouts(self.auto)[generation - 1]


@pytest.fixture
def run(tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch) -> AutoRun:
    """A teacher, and a student that gains 15 points on it."""
    made = AutoRun(tmp_path, write_digits)
    teacher, student = rights(20, 5)
    right = {made.layout(1).teacher: teacher, made.layout(1).student: student}
    monkeypatch.setattr("pipeline.evaluation.decide._is_right", lambda split, folder, *_: right[folder])
    made.model(made.layout(1).teacher, "teacher")
    made.model(made.layout(1).student, "student", weights=b"one")
    return made


def test_only_generations_that_are_certain_are_shown(run: AutoRun) -> None:
    assert known_layouts(run.auto) == [run.layout(1)]
    assert decide(run.auto, run.layout(1)) == decision(20, 5)
    assert known_layouts(run.auto) == [run.layout(1), run.layout(2)]
    assert decide(run.auto, run.layout(2)) is None  # no student yet


def test_a_decision_on_another_student_is_made_again(run: AutoRun) -> None:
    decide(run.auto, run.layout(1))
    storage.remove(run.layout(1).student)
    run.model(run.layout(1).student, "student", weights=b"another")
    assert read_decision(run.layout(1)) is None
    assert known_layouts(run.auto) == [run.layout(1)]
    assert decide(run.auto, run.layout(1)) is not None
    assert storage.exists(f"{run.layout(1).decision}.old-1")


def test_without_validation_images_auto_is_refused() -> None:
    with pytest.raises(ValueError, match=r"generations=auto compares .* data\.validation, which is empty"):
        Config.model_validate({"generations": "auto"})


def test_report_and_status_show_rule_and_decision(run: AutoRun, capsys: pytest.CaptureFixture[str]) -> None:
    print_status(run.auto, known_layouts(run.auto))
    assert "generation 1: then another generation when the student's gain" in capsys.readouterr().out
    decide(run.auto, run.layout(1))
    print_status(run.auto, known_layouts(run.auto))
    assert "+15.00 ± 4.77 points: more than 1 standard error, so generation 2 follows" in capsys.readouterr().out
    html = report_html(read_facts(run.auto, known_layouts(run.auto)), [])
    assert "+15.00 ± 4.77" in html
    assert "at most 3" in html


def test_the_best_generation_is_that_of_the_highest_validation_accuracy_the_earliest_of_equal_ones(
    run: AutoRun,
) -> None:
    summary = summarize([run.layout(1)])  # both have 62.5 %
    assert (summary["best"], summary["best_folder"]) == (0, "gen-1/teacher")
    assert describe_best(summary) == "best on the validation images: the first teacher, 62.50% (gen-1/teacher)"


@pytest.mark.slow
def test_a_run_goes_on_by_itself_and_after_a_kill_never_opening_test_images(
    tmp_path: Path, digits: digits_run.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits_run.write_digits_data(tmp_path, digits[1], make_writer(digits))
    config = tmp_path / "config.yaml"  # a command's own word would be looked for
    config.write_text(re.sub(r"(?m)^  test: .*$", f'  test: ["{tmp_path}/nothing/is/here.tar"]', config.read_text()))
    words = [
        "stage=teacher,label,student", f"config={config}", "generations=auto", "max_generations=2",
        "teacher.epochs=10", "student.epochs=20",
    ]  # fmt: skip
    whole = digits_run.run(*words, f"run_dir={tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    assert "more than 1 standard error, so generation 2 follows" in whole.stdout
    assert "best on the validation images: generation" in whole.stdout
    monkeypatch.setenv(VARIABLE, "step-30/student/rank-0:2")  # of the second generation
    assert digits_run.run(*words, f"run_dir={tmp_path}/killed").returncode == -9
    monkeypatch.delenv(VARIABLE)
    plan = digits_run.run(*words, f"run_dir={tmp_path}/killed", "data.test=[]", "plan=true")
    assert "generation 2  student   would continue" in plan.stdout
    assert "generation 2: then another generation when" in plan.stdout
    again = digits_run.run(*words, f"run_dir={tmp_path}/killed")
    assert again.returncode == 0, again.stderr
    one, two = ((tmp_path / name / "gen-2/student/weights/model.safetensors") for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())["generations"] for name in ("whole", "killed")
    ]
    assert summaries[0] == summaries[1]
    assert summaries[0]["best"] == max(range(3), key=lambda n: summaries[0]["validation_top1"][str(n)])
    assert not (tmp_path / "whole/gen-3").exists()


def test_a_first_teacher_without_validation_images_leaves_no_best_and_no_error(
    run: AutoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(run.auto, run.layout(1))
    record = Path(run.layout(1).teacher, "done.json")
    done = json.loads(record.read_text())
    del done["summary"]["validation_top1"]
    record.write_text(json.dumps(done))
    assert summarize([run.layout(1)]) == {}
    assert "+15.00 ± 4.77" in report_html(read_facts(run.auto, known_layouts(run.auto)), [])
