"""The temperature is the one of the lowest loss, found in a few passes; nothing to calibrate ends at a bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from pipeline.inference import calibration
from pipeline.inference.calibration import calibration_error, confidences, fit_temperature


def case(seed: int, images: int, classes: int, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are `sharpness` times too large for how often they are right."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(images, classes), scale=2.0)
    uniform = generator.gumbel(size=logits.shape)
    return (sharpness * logits).astype(np.float32), (logits + uniform).argmax(axis=1)


def loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits).double() / temperature, torch.from_numpy(labels)))


@pytest.mark.parametrize("sharpness", [0.1, 0.5, 1.0, 3.0, 15.0])
@pytest.mark.parametrize(("images", "classes"), [(60, 2), (5000, 10), (3000, 200)])
def test_no_other_temperature_has_a_lower_loss(images: int, classes: int, sharpness: float) -> None:
    logits, labels = case(images, images, classes, sharpness)
    found = fit_temperature(logits, labels)
    lowest = loss(logits, labels, found)
    for other in (0.9 * found, 0.999 * found, 1.001 * found, 1.1 * found):
        if 0.0498 < other < 20.08:
            assert lowest <= loss(logits, labels, other)


@pytest.mark.parametrize("chunk", [1 << 22, 70])
def test_the_calibration_error_is_that_of_all_probabilities(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of vectors alone, so that nobody holds a matrix of probabilities."""
    monkeypatch.setattr(calibration, "_CHUNK", chunk)
    logits, labels = case(0, 500, 20, 2.0)
    probabilities = F.softmax(torch.from_numpy(logits) / 1.5, dim=1)
    confidence, right = confidences(logits, labels, 1.5)
    np.testing.assert_array_equal(confidence, probabilities.max(dim=1).values.numpy())
    expected = multiclass_calibration_error(
        probabilities, torch.from_numpy(labels), num_classes=20, n_bins=15, norm="l1"
    )
    assert calibration_error(confidence, right) == float(expected)


def test_a_large_set_recovers_how_much_too_sharp_its_logits_are() -> None:
    logits, labels = case(0, 50_000, 10, 3.0)
    assert fit_temperature(logits, labels) == pytest.approx(3.0, rel=0.02)


def test_all_images_are_read_only_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 50,000 images of 1,000 classes take seconds."""
    logits, labels = case(1, 30_000, 20, 2.0)
    passes, original = [], calibration._derivatives

    def counted(scores: torch.Tensor, targets: torch.Tensor, inverse: float) -> tuple[float, float]:
        passes.append(len(scores))
        return original(scores, targets, inverse)

    monkeypatch.setattr(calibration, "_derivatives", counted)
    fit_temperature(logits, labels)
    assert sum(passes) / len(logits) <= 5


@pytest.mark.parametrize(
    ("right", "wrong", "temperature"), [(9.0, 0.0, 0.049787), (0.0, 9.0, 20.085537), (0.0, 0.0, 20.085537)]
)
def test_where_the_loss_has_no_minimum_a_bound_is_found_soon(
    monkeypatch: pytest.MonkeyPatch, right: float, wrong: float, temperature: float
) -> None:
    labels = np.arange(300) % 3
    logits = np.full((300, 3), wrong, np.float32)
    logits[np.arange(300), labels] = right
    monkeypatch.setattr(calibration, "_MAX_PASSES", 20)
    assert fit_temperature(logits, labels) == temperature
