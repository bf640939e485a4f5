"""Probes: each minimizes or votes by its formula; validation images choose; scores count by class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from pipeline.transfer.features import Features
from pipeline.transfer.probes import _fit, _regression, _scaled, _scaling, _votes, knn_probe, linear_probe
from pipeline.transfer.scores import Score, half_width

Digits = tuple[np.ndarray, np.ndarray]


def pixels(digits: Digits, start: int, stop: int) -> Features:
    images, labels = digits
    return Features(
        images[start:stop].reshape(stop - start, -1).astype(np.float32), labels[start:stop].astype(np.int64)
    )


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_the_regression_is_a_minimum_of_mean_cross_entropy_and_half_the_squared_weights(
    digits: Digits, l2: float
) -> None:
    """The gradient of the documented loss is 0 there; with another factor (a sum for the mean, l2 without ½) it is not."""
    known = pixels(digits, 0, 300)
    values = _scaled(known.values, _scaling(known.values))
    model = _regression(l2, len(known)).set_params(tol=1e-8)
    _fit(model, values, known.labels)
    errors = softmax(model.decision_function(values), axis=1) - np.eye(10)[known.labels]
    gradient = errors.T @ values / len(known) + l2 * model.coef_
    assert np.abs(gradient).max() < 1e-4 * np.abs(l2 * model.coef_).max() + 1e-7


def test_features_are_standardized_by_the_images_that_the_probe_learns_from() -> None:
    values = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    mean, deviation = _scaling(values)
    assert (mean.tolist(), deviation.tolist()) == ([2.0, 5.0], [1.0, 1.0])  # a constant feature is not divided by 0
    assert _scaled(values, (mean, deviation)).tolist() == [[-1, 0], [1, 0]]


def test_votes_are_those_of_a_loop_over_all_neighbours(digits: Digits) -> None:
    known, queries = pixels(digits, 0, 120), pixels(digits, 120, 420).values
    settings: list[dict[str, Any]] = [{"k": k, "temperature": t} for k in (1, 7, 500) for t in (0.05, 0.5)]
    found = _votes(known, queries, 10, settings)
    for setting, predicted in zip(settings, found, strict=True):
        assert predicted.tolist() == [_vote_by_hand(known, query, **setting) for query in queries]


def _vote_by_hand(known: Features, query: np.ndarray, k: int, temperature: float) -> int:
    one = query.astype(float)
    cosines = [
        float(row.astype(float) @ one / np.linalg.norm(row.astype(float)) / np.linalg.norm(one)) for row in known.values
    ]
    sums = [0.0] * 10
    for index in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
        sums[int(known.labels[index])] += math.exp(cosines[index] / temperature)
    return int(np.argmax(sums))


def test_the_validation_images_choose_and_the_test_images_do_not(digits: Digits) -> None:
    """Validation labels that are shuffled among test images of the same kind choose by themselves alone."""
    labeled, validation, test = pixels(digits, 0, 200), pixels(digits, 200, 400), pixels(digits, 400, 600)
    wrong = Features(test.values, (test.labels + 1) % 10)
    for probe in (
        lambda held, out: linear_probe(labeled, held, out, [1e-4, 1e-2, 1.0], 1),
        lambda held, out: knn_probe(labeled, held, out, 10, ([1, 5, 50], [0.05, 0.5]), 1),
    ):
        usual, mislabeled = probe(validation, test), probe(validation, wrong)
        assert usual.grid == mislabeled.grid
        assert usual.chosen == mislabeled.chosen
        assert usual.predicted.tolist() == mislabeled.predicted.tolist()
        best = max(setting["validation_top1"] for setting in usual.grid)
        assert usual.chosen == next(setting for setting in usual.grid if setting["validation_top1"] == best)
        assert (usual.predicted == test.labels).mean() > 0.85


def test_after_the_choice_a_probe_learns_from_validation_images_too() -> None:
    """Class 2 has validation images alone: only a probe that learned from them predicts it."""
    random = np.random.default_rng(0)
    centres = 10 * np.eye(3, 8)

    def made(labels: list[int]) -> Features:
        return Features((centres[labels] + random.normal(size=(len(labels), 8))).astype(np.float32), np.array(labels))

    labeled, validation, test = made([0, 1] * 20), made([0, 1, 2] * 10), made([2] * 10)
    assert (linear_probe(labeled, validation, test, [1e-3], 1).predicted == 2).all()
    assert (knn_probe(labeled, validation, test, 3, ([1], [0.1]), 1).predicted == 2).all()


def test_scores_count_images_by_class() -> None:
    score = Score.of(np.array([0, 0, 0, 1, 3]), np.array([0, 0, 1, 1, 0]), 4)
    assert score == Score((2, 1, 0, 0), (3, 1, 0, 1))
    assert score.top1 == pytest.approx(3 / 5)
    assert score.mean_per_class == pytest.approx((2 / 3 + 1 + 0) / 3)  # class 2 has no image


def test_the_interval_has_the_error_of_the_images_and_of_the_seeds() -> None:
    one = Score((45, 45), (50, 50))
    share = 92 / 104
    images = share * (1 - share) / 104
    assert half_width([one]) == pytest.approx(1.96 * math.sqrt(images))
    assert half_width([one] * 3) == pytest.approx(half_width([one]))  # the same test images: more seeds tell no more
    low, high = Score((40, 45), (50, 50)), Score((50, 45), (50, 50))
    assert half_width([low, high]) == pytest.approx(1.96 * math.sqrt(images + 0.005 / 2))
    assert half_width([Score((50, 50), (50, 50))]) > 0.01


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """2,000 test sets of 200 images, right with probability 0.9: their intervals cover 0.9 in 93 to 98 %."""
    random = np.random.default_rng(0)
    covered = 0
    for right in random.binomial(200, 0.9, 2000):
        score = Score((int(right),), (200,))
        covered += abs(score.top1 - 0.9) <= half_width([score])
    assert 0.93 <= covered / 2000 <= 0.98
