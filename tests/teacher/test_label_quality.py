"""What validation images say about labels before a student trains: how many are right, and which classes are poor, unused or empty."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import pytest

from pipeline.core.layout import Layout
from teacher.label_quality import judge_kept, judge_labels
from teacher.selection.stage import select
from teacher.validation_labels import ValidationLabels
from tests.conftest import WriteDigits
from tests.small_run import SmallRun

Group = tuple[int, int, int, float]  # images of class …, labeled …, how many, confidence


def labeled(*groups: Group) -> ValidationLabels:
    true, predicted, count, confidence = zip(*groups, strict=True) if groups else ((), (), (), ())
    columns = (np.repeat(np.array(each), count) for each in (true, predicted, confidence))
    return ValidationLabels(*(each.astype(kind) for each, kind in zip(columns, "iif", strict=True)))


def summary(names: Sequence[str] | None = ("cat", "dog", "owl"), labels: int = 1000) -> dict[str, Any]:
    return {"class_names": names, "num_classes": 3 if names is None else len(names), "labels": labels}


def selection(kept: Sequence[int], cut_off: float = 0.3, **others: Any) -> dict[str, Any]:
    """Content of selection.json: images kept by class; the names are cat, dog and owl."""
    classes = [
        {"class": index, "name": name, "kept": count, "available": count, "cut_off": {"confidence": cut_off}}
        for index, (name, count) in enumerate(zip(("cat", "dog", "owl"), kept, strict=True))
    ]
    rule = {"confidence_threshold": cut_off, "class_thresholds": others.pop("class_thresholds", [])}
    below, duplicates = others.pop("below", 0), others.pop("duplicates", 0)
    reasons = {"below_threshold": below, "held_out_duplicate": duplicates}
    totals = {"rows": sum(kept) + below + duplicates}
    empty = [index for index, count in enumerate(kept) if not count]
    return {
        "rule": rule,
        "classes": classes,
        "empty_classes": empty,
        "reasons": reasons,
        "totals": totals,
        "precision": None,
    } | others


EQUAL = ((0, 0, 100, 0.9), (1, 1, 100, 0.9), (2, 2, 100, 0.9))


def test_all_labels_are_judged_by_the_validation_images_and_their_error() -> None:
    found = judge_labels(labeled((0, 0, 40, 0.9), (1, 1, 30, 0.5), (2, 1, 30, 0.5)), summary())
    assert found.precision == 0.7
    assert found.error == pytest.approx(sqrt(0.7 * 0.3 / 100))
    words = "by validation, 70.0 % ± 4.6 of the 1,000 labels are right (± is one standard error; 100 validation images)"
    assert found.headline() == words


def test_good_labels_need_no_warning_and_no_advice() -> None:
    for found in (judge_labels(labeled(*EQUAL), summary()), judge_kept(labeled(*EQUAL), selection([9, 9, 9]))):
        assert (found.warnings(), found.advice()) == ([], [])


def test_kept_labels_are_judged_by_images_as_sure_and_weighted_as_classes_are_kept() -> None:
    """The cats are 90 % right and a tenth of the kept labels, the dogs 50 % and the rest: 54 %, where all images alike say 70 %."""
    rows = ((0, 0, 90, 0.9), (1, 0, 10, 0.9), (1, 1, 50, 0.9), (2, 1, 50, 0.9), (2, 2, 7, 0.2))
    found = judge_kept(labeled(*rows), selection([100, 900, 0]))
    assert found.precision == pytest.approx(0.54)
    assert found.images == 200, "the owls are not as sure"
    one, two = 91 / 102, 51 / 102
    assert found.error == pytest.approx(sqrt(0.1**2 * one * (1 - one) / 100 + 0.9**2 * two * (1 - two) / 100))
    assert found.headline().startswith("by validation, 54.0 % ± 4.5 of the 1,000 kept labels are right (")
    assert "200 of the 207 validation images are as sure" in found.headline()


def test_with_a_target_the_half_that_chose_the_thresholds_does_not_judge() -> None:
    rows = labeled(*EQUAL)
    found = judge_kept(rows, selection([9, 9, 9], precision={"target": 0.9}))
    assert found.images == len(rows.halves()[1]) == 150


def test_kept_labels_of_classes_that_no_validation_image_has_are_said() -> None:
    found = judge_kept(labeled((0, 0, 30, 0.9), (1, 1, 30, 0.1)), selection([100, 300, 0]))
    assert found.headline().endswith("none in the classes of 75% of the kept labels)")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((), "there are no validation images (data.validation)"),
        (((0, 0, 50, 0.1),), "only 0 of the 50 validation images are as sure"),
        (((0, 0, 7, 0.9), (1, 1, 7, 0.1)), "only 7 of the 14 validation images are as sure, where 20 say something"),
    ],
)
def test_without_enough_validation_images_nothing_is_claimed(rows: tuple[Group, ...], words: str) -> None:
    found = judge_kept(labeled(*rows), selection([10, 10, 10]))
    assert found.headline().startswith("validation does not say how many of the 30 kept labels are right: ")
    assert words in found.headline()
    assert "right (±" not in found.headline()


def test_classes_that_are_mostly_wrong_are_named_least_precise_first() -> None:
    rows = ((0, 0, 100, 0.9), (1, 1, 2, 0.9), (0, 1, 8, 0.9), (2, 2, 7, 0.9), (0, 2, 64, 0.9))
    (warning,) = judge_labels(labeled(*rows), summary()).warnings()
    assert warning == "classes below 30 %, on the validation images: 'owl' 9.9 % of 71"  # 2 of 10 dogs may be chance
    kept = judge_kept(labeled(*rows), selection([100, 100, 100]))
    assert kept.warnings() == [warning]
    assert kept.advice()[-1].startswith("a better teacher: more labeled images, above all of 'owl', or first weights")


def test_classes_that_the_teacher_never_gives_are_named() -> None:
    found = judge_labels(labeled((0, 0, 100, 0.9), (1, 1, 100, 0.9), (2, 1, 9, 0.9)), summary())
    assert found.warnings() == ["the teacher gives no validation image the label 'owl'"]


def test_labels_of_few_classes_are_a_collapse() -> None:
    rows = ((0, 0, 100, 0.9), (1, 0, 80, 0.9), (1, 1, 20, 0.9), (2, 0, 90, 0.9), (2, 2, 10, 0.9))
    (warning,) = judge_labels(labeled(*rows), summary()).warnings()
    assert warning == (
        "the labels collapse to few classes: 1 of 3 hold 90 % of them, where the validation images' own labels need 3; "
        "the largest: 'cat' 90 %"
    )
    (kept,) = judge_kept(labeled(*EQUAL), selection([95, 3, 2])).warnings()
    assert kept.startswith("the labels at or above the threshold collapse to few classes: 1 of 3 hold")


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ({}, "no label is at or above the threshold 0.3"),
        ({"duplicates": 1}, "no label is at or above the threshold 0.3 but those left out as duplicates or excluded"),
        ({"class_thresholds": [0.3, 2.0, 0.3]}, "select.target_precision is reached at no threshold"),
        ({"kept_from": "gen-1"}, "none of the images of the generation before has this label now"),
    ],
)
def test_empty_classes_are_named_with_the_reason(others: dict[str, Any], reason: str) -> None:
    found = judge_kept(labeled(*EQUAL), selection([50, 0, 50], **others))
    assert found.warnings() == [f"1 of 3 classes has no kept label: 'dog' ({reason})"]
    assert found.advice()[0].startswith("a lower select.confidence_threshold or select.target_precision")


def test_a_higher_threshold_is_advised_where_more_labels_are_right() -> None:
    rows = ((0, 0, 50, 0.95), (1, 1, 50, 0.95), (0, 1, 100, 0.4), (1, 0, 100, 0.4))
    found = judge_kept(labeled(*rows), selection([100, 100, 100]))
    assert found.advice()[0] == (
        "a higher threshold: with select.confidence_threshold=0.45, 100.0 % of the validation images' labels are right, "
        "and 33 % of these images have one"
    )
    sure_and_wrong = labeled((0, 0, 50, 0.4), (1, 1, 50, 0.4), (0, 1, 100, 0.95), (1, 0, 100, 0.95))
    assert "higher threshold" not in "".join(judge_kept(sure_and_wrong, selection([100, 100, 100])).advice())


def test_unlabeled_images_unlike_the_labeled_ones_are_seen_by_how_few_reach_the_threshold() -> None:
    rows = labeled(*EQUAL, (0, 0, 100, 0.1))  # three quarters reach it
    found = judge_kept(rows, selection([10, 10, 10], below=60, duplicates=10))
    assert found.warnings() == [
        "33 % of the unlabeled images reach the threshold, but 75 % of the validation images: many are probably unlike "
        "the labeled ones"
    ]
    assert found.advice()[0] == "unlabeled images of the same kind as the labeled ones (data.unlabeled, data.exclude)"
    assert judge_kept(rows, selection([10, 10, 10], below=30)).warnings() == []


def test_many_classes_are_named_in_part() -> None:
    names = [f"class {index}" for index in range(40)]
    rows = [(index, index, 9, 0.9) for index in range(20)] + [(index, 0, 1, 0.9) for index in range(20, 40)]
    (warning,) = judge_labels(labeled(*rows), summary(names)).warnings()
    assert warning.endswith("'class 20', 'class 21', 'class 22', 'class 23', 'class 24' and 15 more")


def test_selecting_prints_it(tmp_path: Any, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]) -> None:
    run = SmallRun(tmp_path, write_digits)
    rows = [(number, number, 20, 0.99) for number in range(8)]
    wrong = [(0, number, 300, 0.99) for number in (8, 9)]  # the target is reached there at no threshold
    config = run.config(select={"target_precision": 0.2, "precision_by_class": True})
    layout = Layout(config.run_dir)
    run.model(layout.teacher, "teacher")
    run.label(config, layout, validation=labeled(*rows, *wrong))
    select(config, layout)
    printed = capsys.readouterr().out
    assert (
        "select: 2 of 10 classes have no kept label: 'digit_8', 'digit_9' (select.target_precision is reached"
        in printed
    )
    assert "select: what usually helps: a lower select.confidence_threshold" in printed
