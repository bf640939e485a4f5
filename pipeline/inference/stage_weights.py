"""Read the weights of a finished stage: what they record, and the calibrated model."""

from __future__ import annotations

from data import storage
from data.images.clean_view import Decoder
from pipeline.core.devices import require_device
from pipeline.core.stage import done_record
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import CONFIG_NAME, MODEL_NAME, WeightsInfo, load_info, load_weights

WEIGHTS_FOLDER = "weights"


def weights_folder(folder: str) -> str:
    """The folder of weights in a stage's folder; `folder` itself when it has none, for weights that were copied alone."""
    inner = storage.join(folder, WEIGHTS_FOLDER)
    return inner if storage.exists(inner) else folder


def read_info(folder: str) -> WeightsInfo:
    """What the weights in a stage's folder, or in a folder of weights, record. Raises ModelError as `load_info`."""
    return load_info(weights_folder(folder))


def load_predictor(
    folder: str,
    device: str,
    batch_size: int = 256,
    views: int = 1,
    decoder: Decoder = "pillow",
    fast: bool = False,
    crops: int = 1,
) -> Predictor:
    """The calibrated model in a stage's folder, or in a folder of weights.

    Args:
        device, batch_size, views, decoder, crops: see `Predictor`.
        fast: fold batch norms and use channels_last: the same logits but for rounding, in less than half the time on CPUs.

    Raises:
        UsageError: torch finds no GPU.
        ModelError: weights are missing or damaged.
    """
    require_device(device)
    weights = weights_folder(folder)
    info, state = load_weights(weights, _digests(folder))
    model = build_model(info.model, info.num_classes, info.model_args, 0.0, 0.0)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{weights}: its {MODEL_NAME} does not fit the model of its {CONFIG_NAME} ({str(error).splitlines()[-1].strip()}); "
            "bring both files again"
        ) from error
    preprocessing = Preprocessing.of_weights(info)
    if fast:
        model = fold_batch_norm(model, preprocessing.view_shape)
    return Predictor(
        model, preprocessing, device, batch_size, info.temperature, views, decoder, channels_last=fast, crops=crops
    )


def _digests(folder: str) -> dict[str, str]:
    """sha256 of the weights' files by name, from the stage's done.json; empty for weights that were copied alone."""
    outputs = (done_record(folder) or {"outputs": {}})["outputs"]
    prefix = f"{WEIGHTS_FOLDER}/"
    return {name.removeprefix(prefix): file["sha256"] for name, file in outputs.items() if name.startswith(prefix)}
