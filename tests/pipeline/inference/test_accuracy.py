"""Accuracy against chance, and temperatures at the bounds of their search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.inference.accuracy import Accuracy, _agreement, _tail
from pipeline.inference.calibration import fit_temperature, temperature_at_bound

Labels = arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4))


@given(Labels)
def test_chance_is_the_mean_accuracy_over_all_orders_of_the_predictions(labels: np.ndarray) -> None:
    predicted = np.random.default_rng(len(labels)).integers(0, 5, len(labels))
    rolled = [float((labels == np.roll(predicted, by)).mean()) for by in range(len(labels))]
    assert Accuracy(labels, predicted).chance == pytest.approx(np.mean(rolled))


@given(Labels, st.integers(0, 4))
def test_a_constant_prediction_is_at_chance_unless_there_are_too_few_images(labels: np.ndarray, constant: int) -> None:
    found = Accuracy(labels, np.full_like(labels, constant))
    assert found.chance == pytest.approx(found.top1)
    too_few = len(labels) < 30 or _tail(len(labels), len(labels), _agreement(labels, labels)) > 0.05
    assert found.at_chance != too_few
    assert not Accuracy(labels, labels).at_chance


@pytest.mark.parametrize(("right", "at_chance"), [(20, True), (27, True), (28, False), (200, False)])
def test_twenty_of_two_hundred_in_ten_classes_are_chance(right: int, at_chance: bool) -> None:
    """Binomial, 200 trials at probability 0.1: 28 or more successes have probability 4.3 %, 27 or more 6.6 %."""
    labels = np.arange(200) % 10
    predicted = (labels + 1) % 10
    predicted[:right] = labels[:right]
    assert Accuracy(labels, predicted).at_chance == at_chance


@pytest.mark.parametrize(("images", "at_chance"), [(8, False), (29, False), (30, True)])
def test_a_few_images_refuse_no_teacher(images: int, at_chance: bool) -> None:
    """Of 8 images in 8 classes, 3 right ones are not significant: a teacher with 37 % would be refused."""
    labels = np.arange(images) % 8
    predicted = np.where(np.arange(images) < 3, labels, (labels + 1) % 8)
    assert Accuracy(labels, predicted).at_chance == at_chance


def test_a_teacher_that_knows_a_rare_class_is_above_chance_though_below_the_majoritys_share() -> None:
    """950 of 1,000 images are of class 0; 100 of them are wrong, and all 50 of class 1 are right."""
    labels = np.array([0] * 950 + [1] * 50)
    predicted = np.array([0] * 850 + [1] * 150)
    assert Accuracy(labels, predicted).top1 < 0.95
    assert not Accuracy(labels, predicted).at_chance


@pytest.mark.parametrize(
    ("minimum", "trials", "p", "expected"), [(1, 1, 0.5, 0.5), (2, 3, 0.5, 0.5), (3, 4, 0.1, 0.0037), (0, 9, 0.3, 1)]
)
def test_the_binomial_tail(minimum: int, trials: int, p: float, expected: float) -> None:
    assert _tail(minimum, trials, p) == pytest.approx(expected)


def test_only_a_temperature_at_a_bound_of_the_search_gives_a_warning() -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(0, 5, (300, 10)).astype(np.float32), random.integers(0, 10, 300)
    assert "confidence says nothing" in temperature_at_bound(fit_temperature(logits, labels))
    assert "nearly all validation images are right" in temperature_at_bound(fit_temperature(logits, logits.argmax(1)))
    labels[:200] = logits.argmax(1)[:200]
    assert temperature_at_bound(fit_temperature(logits, labels)) == ""
    assert temperature_at_bound(1.0) == ""
