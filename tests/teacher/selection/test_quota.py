"""A quota that cannot be met, or that cuts a common class while rare ones are copied, is said by plan, console and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.layout import Layout
from pipeline.run import main
from teacher.selection.label_reader import LabelSource
from teacher.selection.quota import describe_planned_quota, quota_sentences
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import SelectRule
from teacher.selection.selection_file import selection_json
from teacher.selection.stage import select
from tests.conftest import WriteDigits
from tests.pipeline.report.test_report import report_of
from tests.small_run import SmallRun
from tests.teacher.selection.test_select import write_labels


def test_a_plan_says_how_many_classes_can_have_so_many_images() -> None:
    said = describe_planned_quota(1300, 9, 5411, 10)
    assert "select.per_class=1,300 for 9 classes asks for 11,700 images, but 5,411 are unlabeled" in said
    assert "at most 4 classes can have so many" in said
    assert "select.per_class=300, half of the mean" in said


@pytest.mark.parametrize(
    ("per_class", "classes", "unlabeled"), [(None, 9, 5411), (601, 9, 5411), (1300, 0, 5411), (1300, 9, 0)]
)
def test_a_plan_is_silent_when_there_are_as_many_or_the_numbers_are_not_known(
    per_class: int | None, classes: int, unlabeled: int
) -> None:
    assert describe_planned_quota(per_class, classes, unlabeled, 10) == ""


def selected(folder: Path, counts: list[int], per_class: int | None) -> dict[str, Any]:
    """Select from labels that the classes have `counts` of."""
    rows = [(label, 0.9) for label, count in enumerate(counts) for _ in range(count)]
    write_labels(folder, {"s": rows})
    rule = SelectRule(len(counts), 0.3, per_class, max_copies=4)
    names = ["cat", "dog", "cow", "emu", "fox"][: len(counts)]
    return selection_json(select_shards(LabelSource(str(folder), rule), ["s"]), {}, names)


def test_common_classes_that_are_cut_and_rare_ones_that_are_copied_are_named(tmp_path: Path) -> None:
    assert list(quota_sentences(selected(tmp_path, [30, 12, 5, 2], 10))) == [
        "select.per_class=10: 2 of 4 classes have more labels and lose the least sure ones ('cat' 30, 'dog' 12); 2 have fewer and are "
        "filled with copies ('emu' 2 in 8 copies, 'cow' 5 in 10 copies)",
        "select.per_class=10 is not met for 1 of 4 classes, with at most 4 copies of an image ('emu' has 8)",
    ]
    one = next(quota_sentences(selected(tmp_path, [30, 5], 10)))
    assert (
        "1 of 2 classes has more labels and loses the least sure ones ('cat' 30); 1 has fewer and is filled with copies"
        in one
    )


@pytest.mark.parametrize(("counts", "per_class"), [([30, 12], 10), ([10, 10], 10), ([8, 9], 10), ([30, 2], None)])
def test_nothing_is_said_of_a_quota_that_only_chooses_or_only_fills(
    tmp_path: Path, counts: list[int], per_class: int | None
) -> None:
    assert list(quota_sentences(selected(tmp_path, counts, per_class))) == []


def test_the_console_and_the_report_say_it(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SmallRun(tmp_path, write_digits)
    config = run.config(select={"confidence_threshold": 0.3, "per_class": 12, "max_copies": 1}, truth=False)
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout)
    select(config, layout)
    printed = capsys.readouterr().out
    assert "select: select.per_class=12: " in printed
    assert "select: select.per_class=12 is not met for " in printed
    assert "have more labels and lose the least sure ones" in report_of(config, [layout])


def test_the_plan_of_a_run_says_it(
    tmp_path: Path, write_digits: WriteDigits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.planning.plan.print_estimate", lambda *_: None)  # it times the models
    write_digits(tmp_path / "labeled", 0, 20)
    write_digits(tmp_path / "unlabeled", 20, 70, labeled=False)
    words = [f"data.{name}=[{tmp_path}/{name}/*.tar]" for name in ("labeled", "unlabeled")]
    assert main(["stage=select", f"run_dir={tmp_path}/run", *words, "select.per_class=30", "plan=true"]) == 0
    assert "select.per_class=30 for 10 classes asks for 300 images, but 50 are unlabeled" in capsys.readouterr().out
