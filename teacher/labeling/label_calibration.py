"""The temperature of labels that are a mean: over several views (`label.views`), or several teachers (`teacher.ensemble`).

A teacher's own temperature is fitted on one view of one model. The mean of several is less sure than each of them, so it gets a
temperature of its own, fitted on the validation images as they are labeled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data.shards.split import open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import recorded_inputs
from pipeline.inference.calibration import calibration_error, confidences, fit_temperature
from pipeline.inference.ensemble import log_probabilities

CALIBRATION = (
    "calibration"  # the input of a label stage's fingerprint that says on which images its temperature was fitted
)
_DIGITS = 4  # of the temperature: its standard error is above 0.001, and rounding noise of a GPU must not change it


@dataclass(frozen=True, eq=False)
class LabelCalibration:
    """A fitted temperature.

    Attributes:
        temperature: see `Ensemble`.
        confidence: calibrated, float32 (N,), of the images that it was fitted on.
        error_before, error_after: expected calibration error, fractions.
    """

    temperature: float
    confidence: np.ndarray
    error_before: float
    error_after: float


def can_calibrate(config: Config) -> bool:
    """Whether labels are a mean, and there are validation images to fit its temperature on."""
    return (config.label.num_views > 1 or bool(config.teacher.ensemble)) and bool(config.data.validation)


def calibration_input(config: Config, layout: Layout, force: bool = False) -> str | None:
    """Digest of the images on which the labels' temperature is fitted; None if labels have only their teacher's temperature.

    They have only that where they are no mean, without validation images, and in labels begun by an earlier version, which fitted none:
    those go on as they began.

    Args:
        force: labels that are there do not count.
    """
    if not can_calibrate(config):
        return None
    there = None if force else recorded_inputs(layout.labels)
    if there is not None and CALIBRATION not in there:
        return None
    return open_split(config.data.validation, layout.indexes).digest()


def calibrate_labels(probabilities: np.ndarray, labels: np.ndarray) -> LabelCalibration:
    """Fit the temperature of labels.

    Args:
        probabilities: means over views and teachers, float32 (N, C), of the validation images.
        labels: the true ones, (N,) int64.
    """
    logits = log_probabilities(torch.from_numpy(probabilities)).numpy()
    temperature = round(fit_temperature(logits, labels), _DIGITS)
    before = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    after = before if temperature == 1 else confidences(logits, labels, temperature)
    return LabelCalibration(temperature, after[0], calibration_error(*before), calibration_error(*after))
