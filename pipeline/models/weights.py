"""Weights for inference in this pipeline's format: a folder that timm loads as `local-dir:`.

`model.safetensors` holds tensors under timm's names. `config.json` has timm's fields and, under `noisy_student`, this pipeline's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
from pydantic import BaseModel, Field
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor

from data import storage
from data.clips.sampling import ClipSampling
from data.json_files import read_json
from pipeline.models.registry import timm_architecture
from pipeline.models.resnet_rs import ModelError

MODEL_NAME, CONFIG_NAME = "model.safetensors", "config.json"
OURS = "noisy_student"  # this pipeline's key in config.json

Positive = Annotated[float, Field(gt=0)]


class WeightsInfo(BaseModel, extra="forbid", frozen=True):
    """The model, its preprocessing (see `Preprocessing`) and its quality when it was saved."""

    schema_version: int = 1
    model: str
    model_args: dict[str, Any] = {}
    num_classes: int
    class_names: list[str] | None = None  # in the order of the outputs
    image_size: int = Field(ge=8)  # pixels
    crop_pct: float = Field(gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic"]
    resize: Literal["crop", "pad"] = "crop"
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    clip: ClipSampling | None = None  # of a model of clips
    temperature: float = 1.0  # divides the logits
    validation_top1: float | None = None  # a fraction
    generation: int = 0
    seed: int = 0
    provenance: dict[str, Any] = {}  # the stage's fingerprint


class _Config(BaseModel):
    """This pipeline's part of `config.json`."""

    noisy_student: WeightsInfo


def save_weights(folder: str, state: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Write a weights folder. Equal weights give equal bytes."""
    # clones: safetensors refuses tensors that share memory, as tied weights do
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}
    storage.write_bytes(storage.join(folder, MODEL_NAME), safetensors.torch.save(tensors, {"format": "pt"}))
    storage.write_text(storage.join(folder, CONFIG_NAME), json.dumps(_timm_config(info), indent=1) + "\n")


def _timm_config(info: WeightsInfo) -> dict[str, Any]:
    """The content of `config.json`."""
    architecture, args = timm_architecture(info.model, info.model_args)
    config: dict[str, Any] = {"architecture": architecture, "num_classes": info.num_classes}
    if args:
        config["model_args"] = args
    if info.class_names:
        config["label_names"] = info.class_names
    known = get_pretrained_cfg(architecture) or PretrainedCfg()
    config["pretrained_cfg"] = {
        "input_size": [args.get("in_chans", 3), info.image_size, info.image_size],
        "fixed_input_size": known.fixed_input_size,  # without it timm builds a ViT for 224 px and resamples its positions
        "first_conv": known.first_conv,
        "classifier": known.classifier,  # timm needs it to fine-tune to other classes
        "crop_pct": info.crop_pct,
        "crop_mode": "border" if info.resize == "pad" else "center",
        "interpolation": info.interpolation,
        "mean": list(info.mean),
        "std": list(info.std),
        "num_classes": info.num_classes,
    }
    return config | {OURS: info.model_dump(mode="json", exclude=None if info.clip else {"clip"})}


def load_weights(folder: str, digests: Mapping[str, str] | None = None) -> tuple[WeightsInfo, dict[str, Tensor]]:
    """Read a weights folder of this pipeline.

    Args:
        digests: known sha256 of its files, by name.

    Raises:
        ModelError: a file is missing, damaged or not of this pipeline.
    """
    for name, expected in (digests or {}).items():
        if hashlib.sha256(storage.read_bytes(storage.join(folder, name))).hexdigest() != expected:
            raise ModelError(
                f"{storage.join(folder, name)}: damaged: its sha256 is not the one in the stage's done.json; bring the file "
                "again, or delete done.json and run the stage again, which continues from its last checkpoint"
            )
    return load_info(folder), read_safetensors(storage.join(folder, MODEL_NAME))


def load_info(folder: str) -> WeightsInfo:
    """Read what a weights folder records, without the weights. Raises ModelError as `load_weights`."""
    url = storage.join(folder, CONFIG_NAME)
    try:
        return _Config.model_validate(read_json(url, "expected what this pipeline writes")).noisy_student
    except storage.StorageError:  # the store did not answer: the folder may be right
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{url}: not a weights folder of this pipeline ({type(error).__name__}: {error})") from error


def read_safetensors(url: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, by name. Raises ModelError where it is missing or damaged."""
    try:
        return safetensors.torch.load(storage.read_bytes(url))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{url}: not readable as safetensors ({error})") from error
