"""Precision at a threshold: an estimate with an interval; thresholds chosen on one half of the images, checked on the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.selection.precision import (
    MIN_IMAGES,
    choose_thresholds,
    describe_check,
    precision_json,
)
from teacher.selection.rule import MAX_CONFIDENCE, UNREACHED, SelectError, SelectRule
from teacher.validation_labels import Precision, ValidationLabels


def held_out(confidence: np.ndarray, right: np.ndarray, predicted: np.ndarray | None = None) -> ValidationLabels:
    predicted = np.zeros(len(right), np.int32) if predicted is None else predicted.astype(np.int32)
    return ValidationLabels(
        np.where(right, predicted, predicted + 1).astype(np.int32), predicted, confidence.astype(np.float32)
    )


def calibrated(count: int, seed: int = 0) -> ValidationLabels:
    """A label of confidence c is right with probability c."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.2, 1.0, count)
    return held_out(confidence, rng.random(count) < confidence, rng.integers(0, 4, count))


def test_the_interval_is_wilsons() -> None:
    """Figures of the worked example in Newcombe, Statistics in Medicine 17 (1998): 81 of 263 gives 0.2553 to 0.3662."""
    found = Precision(263, 81).as_json()
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.2553, 0.3662)
    assert Precision(0, 0).as_json()["precision"] is None
    assert Precision(7, 7).as_json()["high"] == 1.0
    assert Precision(7, 0).as_json()["low"] == 0.0


def test_the_halves_share_no_image_and_each_class_alike() -> None:
    rows = calibrated(1001)
    rows = ValidationLabels(rows.label, rows.predicted, np.arange(1001, dtype=np.float32))
    one, two = rows.halves()
    assert sorted([*one.confidence, *two.confidence]) == list(range(1001))
    assert np.abs(np.bincount(one.label, minlength=5) - np.bincount(two.label, minlength=5)).max() <= 1
    assert (rows.halves()[0].confidence == one.confidence).all()


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]), st.booleans()), min_size=2, max_size=60), st.data()
)
@settings(max_examples=200, deadline=None)
def test_the_threshold_is_the_lowest_that_reaches_the_target_on_its_half(
    rows: list[tuple[float, bool]], data: st.DataObject
) -> None:
    target, minimum = data.draw(st.sampled_from([0.3, 0.5, 0.8])), data.draw(st.sampled_from([0.0, 0.25, 0.6]))
    everything = held_out(*(np.array(column) for column in zip(*rows, strict=True)))
    half, _ = everything.halves()
    possible = [
        c
        for c in sorted({*half.confidence.tolist(), minimum})
        if c >= np.float32(minimum)
        and (above := half.confidence >= np.float32(c)).any()
        and (half.label == half.predicted)[above].mean() >= target
    ]
    if not possible:
        with pytest.raises(SelectError, match="target_precision"):
            choose_thresholds(everything, target, minimum, 1)
        return
    chosen = choose_thresholds(everything, target, minimum, 1)[0]
    kept = half.confidence >= chosen
    assert chosen >= np.float32(minimum)
    assert (kept == (half.confidence >= np.float32(possible[0]))).all()


def test_the_other_half_agrees_when_confidences_mean_what_they_say() -> None:
    """A label of confidence c is right with probability c, and the mean of U(0.8, 1) is 0.9. The interval is one of 95 %."""
    held = []
    for seed in range(50):
        rows = calibrated(4000, seed)
        thresholds = choose_thresholds(rows, 0.9, 0.0, 4)
        assert thresholds == pytest.approx([0.8] * 4, abs=0.1)
        found = precision_json(rows, thresholds, 0.9, 0.0)
        assert found is not None
        assert found["chosen_on"]["precision"] >= 0.9
        assert found["chosen_on"]["images"] + found["checked_on"]["images"] == (rows.confidence >= thresholds[0]).sum()
        assert sum(entry["images"] for entry in found["classes"]) == found["checked_on"]["images"]
        truth = (1 + thresholds[0]) / 2
        held.append(found["checked_on"]["low"] < truth < found["checked_on"]["high"])
    assert sum(held) >= 44


def test_classes_have_their_own_threshold_where_there_are_enough_images() -> None:
    rng = np.random.default_rng(0)
    predicted = np.repeat([0, 1, 2], [4000, 4000, MIN_IMAGES])
    confidence = rng.uniform(0.2, 1.0, len(predicted))
    right = np.where(predicted == 0, confidence > 0.6, confidence > 0.3)  # class 0 is the harder one
    rows = held_out(confidence, right, predicted)
    common = choose_thresholds(rows, 0.95, 0.0, 3)
    own = choose_thresholds(rows, 0.95, 0.0, 3, by_class=True)
    assert own[0] > common[0] > own[1]
    assert own[2] == common[2], "half of MIN_IMAGES is not enough"


def test_a_class_that_never_reaches_the_target_keeps_none_not_even_the_surest() -> None:
    predicted = np.repeat([0, 1], [1000, 1000])
    confidence = np.where(predicted == 0, np.float32(1.000001), np.linspace(0.5, 1.0, 2000, dtype=np.float32))
    right = np.where(
        predicted == 0, np.arange(2000) % 2 == 0, True
    )  # the overconfident class is right half of the time
    thresholds = choose_thresholds(held_out(confidence, right, predicted), 0.7, 0.0, 2, by_class=True)
    assert thresholds[0] == UNREACHED > MAX_CONFIDENCE
    assert SelectRule(2, float(thresholds.min()), None, 1, tuple(thresholds.tolist())).thresholds[0] == UNREACHED


def test_a_promise_that_the_check_refutes_is_called_missed() -> None:
    assert describe_check(Precision(1000, 990).as_json(), 0.95) == "confirmed"
    assert describe_check(Precision(1000, 800).as_json(), 0.95).startswith("missed")
    assert describe_check(Precision(99, 99).as_json(), 0.95).startswith("too few validation images")


def test_without_validation_images_a_target_is_refused_and_nothing_is_reported() -> None:
    nothing = ValidationLabels(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    with pytest.raises(SelectError, match="without validation images"):
        choose_thresholds(nothing, 0.9, 0.0, 4)
    assert precision_json(nothing, np.zeros(4, np.float32), None, 0.0) is None
