"""Figures of the report follow from their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.inference.calibration import calibration_error, reliability_bins
from pipeline.report.facts import Model, Predictions, compare
from pipeline.report.pictures import thumbnail


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_the_error_of_a_difference_is_that_of_the_mean_of_paired_differences(pairs: list[tuple[bool, bool]]) -> None:
    right = np.array(pairs)
    models = [
        Model(name, "", {}, {}, Predictions("t", np.ones(len(pairs)), right[:, side], np.ones(len(pairs))))
        for side, name in enumerate(("a", "b"))
    ]
    result = compare(*models)
    assert result is not None
    differences = right[:, 1].astype(float) - right[:, 0]
    assert result.difference == pytest.approx(differences.mean())
    assert result.error == pytest.approx(differences.std() / np.sqrt(len(pairs)), abs=1e-9)


def test_reliability_bins_are_those_of_the_calibration_error() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.5, 1, 5000).astype(np.float32)
    right = random.random(5000) < confidence**2
    means, accuracies = reliability_bins(confidence, right)
    weights = np.histogram(confidence, np.linspace(0, 1, 16))[0]
    expected = calibration_error(confidence, right)
    assert (np.abs(means - accuracies) * weights[weights > 0] / 5000).sum() == pytest.approx(expected, abs=1e-5)


def test_large_images_become_small_pictures(photo: np.ndarray) -> None:
    uri = thumbnail(photo)
    assert uri.startswith("data:image/jpeg")
    assert len(uri) < 12_000
