"""From a trained checkpoint to a stage's published output, and back: weights that say what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from data import storage
from data.images.clean_view import Decoder
from data.shards.split import Split
from pipeline.core.schema import Config, LabelConfig, TrainConfig
from pipeline.core.stage import Stage, StageError, digest_of, done_record
from pipeline.inference.accuracy import Accuracy
from pipeline.inference.calibration import (
    calibration_error,
    fit_temperature,
    reliability_bins,
    softmax,
    temperature_at_bound,
)
from pipeline.inference.predictor import Ensemble, Predictor, predict_split, top_k_accuracy
from pipeline.inputs.noised_view import noised
from pipeline.models.device import require_device
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import (
    CONFIG_NAME,
    MODEL_NAME,
    WeightsInfo,
    load_info,
    load_weights,
    save_weights,
    weights_digest,
)
from pipeline.upstream.stage_inputs import require_same_classes

WEIGHTS_FOLDER = "weights"


def publish(
    stage: Stage,
    section: TrainConfig,
    config: Config,
    state: dict[str, Tensor],
    class_names: tuple[str, ...] | None,
    num_classes: int,
    generation: int,
    validation: Split | None,
    outputs: tuple[str, ...] = (),
    extra: dict[str, Any] | None = None,
) -> None:
    """Calibrate on the validation images, write `weights/`, and commit the stage.

    Args:
        state: EMA weights, or weights trained elsewhere.
        generation: how many rounds of pseudo-labels went into these weights (0: a teacher trained on labels alone).
        outputs: further files of the stage, committed with the weights.
        extra: for the stage's summary.
    """
    require_device(config.resolved_device())
    model = build_model(section.model, num_classes, section.model_args, 0.0, 0.0)
    model.load_state_dict(state)
    quality: dict[str, Any] = {}
    if validation is not None:
        logits, labels = predict_split(validation, Predictor(model, section, config.resolved_device()))
        quality = _quality(logits, labels)
        _tell_quality(stage.name, Accuracy(labels, logits.argmax(axis=1)), quality["temperature"], class_names)
    info = WeightsInfo(
        model=section.model,
        model_args=section.model_args,
        num_classes=num_classes,
        class_names=list(class_names) if class_names else None,
        image_size=section.image_size,
        crop_pct=section.crop_pct,
        interpolation=section.interpolation,
        resize="pad" if section.augment.crop == "pad_crop" else "crop",
        mean=section.mean,
        std=section.std,
        precision=section.precision,
        temperature=quality.get("temperature", 1.0),
        validation_top1=quality.get("validation_top1"),
        generation=generation,
        seed=config.seed,
        provenance=stage.fingerprint.as_json(),
    )
    save_weights(stage.path(WEIGHTS_FOLDER), state, info)
    files = [f"{WEIGHTS_FOLDER}/{name}" for name in storage.list_names(stage.path(WEIGHTS_FOLDER))]
    stage.commit([*files, *outputs], quality | (extra or {}))


def _quality(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What the validation images say of a model: accuracy, the temperature that calibrates it, and how calibrated it is without
    and with it.

    Args:
        logits: float32 (N, C).
        labels: (N,) int.
    """
    temperature = fit_temperature(logits, labels)
    before, after = softmax(logits, 1.0), softmax(logits, temperature)
    return {
        "validation_top1": top_k_accuracy(logits, labels)[0],
        "validation_images": len(labels),
        "temperature": temperature,
        "calibration_error_before": calibration_error(before, labels),
        "calibration_error_after": calibration_error(after, labels),
        "reliability": {"before": _reliability(before, labels), "after": _reliability(after, labels)},
    }


def _tell_quality(name: str, found: Accuracy, temperature: float, class_names: Sequence[str] | None) -> None:
    """Say how right the model is, and whether that is suspicious, before anything is built on it."""
    print(f"{name}: {found.describe(class_names)}", flush=True)
    if found.at_chance:
        print(f"{name}: no better than chance, which has {found.chance:.1%}; stage=label will refuse to label with it")
    if warning := temperature_at_bound(temperature):
        print(f"{name}: {warning}")


def _reliability(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    bins = reliability_bins(probabilities.max(axis=1), probabilities.argmax(axis=1) == labels)
    return {name: values.tolist() for name, values in zip(("confidence", "accuracy"), bins, strict=True)}


def read_info(folder: str) -> WeightsInfo:
    """What the weights of a stage's folder say of themselves."""
    return load_info(_weights_folder(folder))


def load_predictor(
    folder: str, device: str, batch_size: int = 256, views: int = 1, decoder: Decoder = "pillow", fast: bool = False
) -> Predictor:
    """The calibrated model of a stage's folder.

    Args:
        fast: fold batch norms and use channels_last: the same but for rounding, in less than half the time on CPUs.

    Raises:
        UsageError: a GPU that is not there.
        ModelError: weights that are damaged, or not there.
    """
    require_device(device)
    info, state = load_weights(_weights_folder(folder), _digests(folder))
    model = build_model(info.model, info.num_classes, info.model_args, 0.0, 0.0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{_weights_folder(folder)}: its {MODEL_NAME} is not of its {CONFIG_NAME}'s model ({str(error).splitlines()[-1].strip()}); "
            "bring both files again"
        ) from error
    config = preprocessing(info).model_copy(update={"channels_last": fast})
    if fast:
        model = fold_batch_norm(model, info.image_size)
    return Predictor(model, config, device, batch_size, info.temperature, views, decoder)


def load_labeling_predictor(folders: Sequence[str], config: LabelConfig, device: str) -> Predictor | Ensemble:
    """The teacher as it labels; several are averaged.

    Args:
        folders: of stages or of weights, the teacher's first.

    Raises:
        UsageError: a GPU that is not there.
        ModelError: no weights of this pipeline in a folder.
        StageError: teachers of an ensemble with other classes, or that see images in another way.
    """
    infos = [read_info(folder) for folder in folders]
    for folder, info in zip(folders[1:], infos[1:], strict=True):
        require_same_classes(infos[0].class_names, "the teacher", info.class_names, f"teacher.ensemble: {folder}")
        for field in ("num_classes", "image_size", "crop_pct", "interpolation", "resize"):
            ours, theirs = getattr(infos[0], field), getattr(info, field)
            if ours != theirs:
                raise StageError(
                    f"teacher.ensemble: {folder} has {field} {theirs!r}, the teacher {ours!r}; expected the same, as an "
                    "image is prepared once for all"
                )
    members = [
        load_predictor(folder, device, config.batch_size, config.views, config.decoder, fast=True) for folder in folders
    ]
    if config.augment is not None:
        for member in members:
            member.view = noised(member.view, config.augment, member.config)
    return members[0] if len(members) == 1 else Ensemble(members)


def ensemble_digest(folders: Sequence[str]) -> str:
    """Identity of the weights of several folders. Raises ModelError when there are none in one."""
    return digest_of([weights_digest(_weights_folder(folder)) for folder in folders])


def _weights_folder(folder: str) -> str:
    """A stage's folder has its weights in one below."""
    inner = storage.join(folder, WEIGHTS_FOLDER)
    return inner if storage.exists(inner) else folder


def _digests(folder: str) -> dict[str, str]:
    """sha256 of the weights' files by name, of a stage's folder; none of weights that have traveled alone."""
    outputs = (done_record(folder) or {"outputs": {}})["outputs"]
    inside = f"{WEIGHTS_FOLDER}/"
    return {
        name.removeprefix(inside): described["sha256"] for name, described in outputs.items() if name.startswith(inside)
    }


def preprocessing(info: WeightsInfo) -> TrainConfig:
    """The configuration fields that inference needs, from the weights alone."""
    fields = {
        name: getattr(info, name) for name in ("image_size", "crop_pct", "interpolation", "mean", "std", "precision")
    }
    crop = "pad_crop" if info.resize == "pad" else "random_resized_crop"
    return TrainConfig.model_validate({**fields, "model": info.model, "augment": {"crop": crop}})
