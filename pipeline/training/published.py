"""From a trained checkpoint to a stage's published output, and back: weights that say what they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from data import storage
from data.manifest import Split
from data.view import Decoder
from pipeline.config import Config, TrainConfig, require_device
from pipeline.models.factory import build_model
from pipeline.models.folding import fold_batch_norm
from pipeline.models.weights import WeightsInfo, load_weights, save_weights
from pipeline.stage import Stage
from pipeline.training.calibration import calibration_error, fit_temperature, softmax
from pipeline.training.inference import Predictor, predict_split, top_k_accuracy

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
    temperature = 1.0
    if validation is not None:
        logits, labels = predict_split(validation, Predictor(model, section, config.resolved_device()))
        temperature = fit_temperature(logits, labels)
        quality = {
            "validation_top1": top_k_accuracy(logits, labels)[0],
            "validation_images": len(labels),
            "temperature": temperature,
            "calibration_error_before": calibration_error(softmax(logits, 1.0), labels),
            "calibration_error_after": calibration_error(softmax(logits, temperature), labels),
        }
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
        temperature=temperature,
        validation_top1=quality.get("validation_top1"),
        generation=generation,
        seed=config.seed,
        provenance=stage.fingerprint.as_json(),
    )
    save_weights(stage.path(WEIGHTS_FOLDER), state, info)
    files = [f"{WEIGHTS_FOLDER}/{name}" for name in storage.list_names(stage.path(WEIGHTS_FOLDER))]
    stage.commit([*files, *outputs], quality | (extra or {}))


def read_info(folder: str) -> WeightsInfo:
    """What the weights of a stage's folder say of themselves."""
    return load_weights(storage.join(folder, WEIGHTS_FOLDER))[0]


def load_predictor(
    folder: str, device: str, batch_size: int = 256, views: int = 1, decoder: Decoder = "pillow", fast: bool = False
) -> Predictor:
    """The calibrated model of a stage's folder.

    Args:
        fast: fold batch norms and use channels_last: the same but for rounding, in less than half the time on CPUs.

    Raises:
        UsageError: a GPU that is not there.
    """
    require_device(device)
    info, state = load_weights(storage.join(folder, WEIGHTS_FOLDER))
    model = build_model(info.model, info.num_classes, info.model_args, 0.0, 0.0)
    model.load_state_dict(state)
    config = preprocessing(info).model_copy(update={"channels_last": fast})
    if fast:
        model = fold_batch_norm(model, info.image_size)
    return Predictor(model, config, device, batch_size, info.temperature, views, decoder)


def preprocessing(info: WeightsInfo) -> TrainConfig:
    """The configuration fields that inference needs, from the weights alone."""
    fields = {name: getattr(info, name) for name in ("image_size", "crop_pct", "interpolation", "mean", "std")}
    crop = "pad_crop" if info.resize == "pad" else "random_resized_crop"
    return TrainConfig.model_validate({**fields, "model": info.model, "augment": {"crop": crop}})
