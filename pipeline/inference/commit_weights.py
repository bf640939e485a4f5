"""Commit a stage's weights: calibrate on the validation images, record what the weights are, write them, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data.shards.split import Split
from pipeline.core.devices import call_on_device, require_device
from pipeline.core.schema import Config, TrainConfig
from pipeline.core.stage import Stage
from pipeline.inference.accuracy import Accuracy
from pipeline.inference.calibration import (
    calibration_error,
    confidences,
    fit_temperature,
    reliability_bins,
    temperature_at_bound,
)
from pipeline.inference.predictor import Predicted, Predictor, predict_sampled
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inference.stage_weights import WEIGHTS_FOLDER
from pipeline.inference.weights_card import write_weights_card
from pipeline.models.registry import build_model
from pipeline.models.weights import CONFIG_NAME, MODEL_NAME, WeightsInfo, save_weights


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model after its training, here or elsewhere.

    Attributes:
        section: names the architecture and the preprocessing.
        state: state dict of the EMA weights, or of weights trained elsewhere.
        num_classes: outputs of the model.
        class_names: in the order of the outputs; None where the shards name none.
        generation: rounds of pseudo-labels behind these weights (0: a teacher trained on labels alone).
    """

    section: TrainConfig
    state: dict[str, Tensor]
    num_classes: int
    class_names: Sequence[str] | None
    generation: int


def commit_weights(
    stage: Stage,
    trained: TrainedModel,
    config: Config,
    validation: Split | None,
    outputs: Sequence[str] = (),
    summary: dict[str, Any] | None = None,
) -> None:
    """Calibrate the model on the validation images, write `weights/`, and commit the stage.

    Args:
        outputs: further files of the stage, committed with the weights.
        summary: further entries of the stage's summary.

    Raises:
        UsageError: torch finds no GPU.
        DataError: a validation image cannot be decoded.
    """
    preprocessing = Preprocessing.of_training(trained.section)
    device = config.resolved_device()
    require_device(device, config.ray_address)
    quality = call_on_device(
        device, config.ray_address, _measure_quality, stage.name, trained, preprocessing, device, validation
    )
    info = WeightsInfo(
        model=trained.section.model,
        model_args=trained.section.model_args,
        num_classes=trained.num_classes,
        class_names=list(trained.class_names) if trained.class_names else None,
        **asdict(preprocessing),
        temperature=quality.get("temperature", 1.0),
        validation_top1=quality.get("validation_top1"),
        generation=trained.generation,
        seed=config.seed,
        provenance=stage.fingerprint.as_json(),
    )
    save_weights(stage.path(WEIGHTS_FOLDER), trained.state, info)
    write_weights_card(
        stage.path(WEIGHTS_FOLDER), info
    )  # no output of the stage: `evaluate` adds the accuracy on test images
    files = [f"{WEIGHTS_FOLDER}/{name}" for name in (CONFIG_NAME, MODEL_NAME)]
    stage.commit([*files, *outputs], quality | (summary or {}))


def _measure_quality(
    stage_name: str, trained: TrainedModel, preprocessing: Preprocessing, device: str, validation: Split | None
) -> dict[str, Any]:
    """Measure the model on the validation images and print its accuracy; empty without any."""
    section = trained.section
    model = build_model(section.model, trained.num_classes, section.model_args, 0.0, 0.0)
    model.load_state_dict(trained.state)
    if validation is None:
        return {}
    predictor = Predictor(model, preprocessing, device, section.eval_batch_size, channels_last=section.channels_last)
    found = predict_sampled(validation, predictor.view, predictor.batch_size, predictor.logits)
    accuracy = Accuracy(found.labels, found.predicted)
    quality = {"validation_top1": accuracy.top1, "validation_images": accuracy.images} | _calibrated(found)
    _print_accuracy(stage_name, accuracy, quality["temperature"], trained.class_names)
    return quality


def _calibrated(found: Predicted) -> dict[str, Any]:
    """The temperature that calibrates the model, and its calibration before and after, on the images whose logits are held."""
    labels = found.scored_labels
    temperature = fit_temperature(found.scores, labels)
    before, after = (confidences(found.scores, labels, value) for value in (1.0, temperature))
    return {
        "temperature": temperature,
        "calibration_error_before": calibration_error(*before),
        "calibration_error_after": calibration_error(*after),
        "reliability": {"before": _reliability(*before), "after": _reliability(*after)},
    }


def _reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, list[float]]:
    bins = reliability_bins(confidence, right)
    return {name: values.tolist() for name, values in zip(("confidence", "accuracy"), bins, strict=True)}


def _print_accuracy(name: str, found: Accuracy, temperature: float, class_names: Sequence[str] | None) -> None:
    """Print the accuracy, and warn of a suspicious one before later stages build on it."""
    print(f"{name}: {found.describe(class_names)}", flush=True)
    if found.at_chance:
        print(f"{name}: no better than chance, which has {found.chance:.1%}; stage=label will refuse to label with it")
    if warning := temperature_at_bound(temperature):
        print(f"{name}: {warning}")
