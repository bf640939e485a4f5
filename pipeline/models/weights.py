"""Weights for inference: a folder that timm loads by `local-dir:`, and weights that were trained elsewhere.

`model.safetensors` holds plain timm names; `config.json` has what timm reads, and under `noisy_student` what this pipeline adds.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import BaseModel
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor

from data import storage
from data.json_files import read_json
from pipeline.models.registry import build_model, on_meta, timm_architecture
from pipeline.models.resnet_rs import ModelError

MODEL_NAME, CONFIG_NAME = "model.safetensors", "config.json"
OURS = "noisy_student"
_TORCH = (".pth", ".pt", ".bin", ".pth.tar")  # timm's training script writes the last
_ZIP = b"PK\x03\x04"  # how a file of torch.save begins
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_SHOWN = 4  # names in an error

logger = logging.getLogger(__name__)


class WeightsInfo(BaseModel, extra="forbid", frozen=True):
    """What a model is, how its inputs are made, and how good it was when it was saved."""

    schema_version: int = 1
    model: str
    model_args: dict[str, Any] = {}
    num_classes: int
    class_names: list[str] | None = None
    image_size: int
    crop_pct: float
    interpolation: str
    resize: Literal["crop", "pad"] = "crop"  # pad: images smaller than image_size are padded, not enlarged
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: Literal["fp32", "bf16"] = "fp32"  # in which it was calibrated, and answers
    temperature: float = 1.0  # divides the logits
    validation_top1: float | None = None  # a fraction
    generation: int = 0
    seed: int = 0
    provenance: dict[str, Any] = {}


class _Config(BaseModel):
    """`config.json`: what is ours of it."""

    noisy_student: WeightsInfo


def save_weights(folder: str, state: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Write a weights folder; the same weights give the same bytes."""
    # copies: safetensors refuses tensors that share memory, as tied weights do
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}
    storage.write_bytes(storage.join(folder, MODEL_NAME), safetensors.torch.save(tensors, {"format": "pt"}))
    storage.write_text(storage.join(folder, CONFIG_NAME), json.dumps(_timm_config(info), indent=1) + "\n")


def _timm_config(info: WeightsInfo) -> dict[str, Any]:
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
        "classifier": known.classifier,  # with it timm can fine-tune to other classes
        "crop_pct": info.crop_pct,
        "crop_mode": "border" if info.resize == "pad" else "center",
        "interpolation": info.interpolation,
        "mean": list(info.mean),
        "std": list(info.std),
        "num_classes": info.num_classes,
    }
    return config | {OURS: info.model_dump(mode="json")}


def load_weights(folder: str, digests: Mapping[str, str] | None = None) -> tuple[WeightsInfo, dict[str, Tensor]]:
    """A weights folder of this pipeline.

    Args:
        digests: sha256 of its files, by name, as far as they are known.

    Raises:
        ModelError: files that are missing, damaged or not of this pipeline.
    """
    for name, expected in (digests or {}).items():
        if hashlib.sha256(storage.read_bytes(storage.join(folder, name))).hexdigest() != expected:
            raise ModelError(
                f"{storage.join(folder, name)}: damaged: its digest is not that of done.json beside its folder; bring the file "
                "again, or delete done.json and run the stage again, which continues from its last checkpoint"
            )
    return load_info(folder), _read_safetensors(storage.join(folder, MODEL_NAME))


def load_info(folder: str) -> WeightsInfo:
    """What a weights folder says of itself, without reading the weights. Raises ModelError as `load_weights`."""
    url = storage.join(folder, CONFIG_NAME)
    try:
        return _Config.model_validate(read_json(url, "expected what this pipeline writes")).noisy_student
    except storage.StorageError:  # nobody can tell what is there
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"{url}: not a weights folder of this pipeline ({type(error).__name__}: {error})") from error


def load_external(name: str, args: Mapping[str, Any], num_classes: int, source: str) -> dict[str, Tensor]:
    """The state dict of a model that was trained elsewhere, checked against the model.

    Args:
        source: a .safetensors, .pth, .pt or .pth.tar file, a weights folder, or `pretrained` for timm's own.

    Raises:
        ModelError: a file that cannot be read, holds pickled code, or does not fit the model.
    """
    if source == "pretrained":
        return _timm_pretrained(name, args, num_classes)
    model = on_meta(lambda: build_model(name, num_classes, args))
    state = _read_state(source)
    wanted = dict(model.state_dict())
    # safetensors files do not keep the order of their tensors
    in_order = source.endswith(_TORCH)
    return (
        _by_order(source, state, wanted)
        if in_order and _same_in_order(state, wanted)
        else _by_name(source, state, wanted)
    )


def other_preprocessing(name: str, args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What timm records of its own weights of a model, for those of the `given` fields (mean, std, …) where it differs."""
    known = get_pretrained_cfg(name) or get_pretrained_cfg(timm_architecture(name, args)[0])
    recorded = {field: getattr(known, field, value) for field, value in given.items()}
    return {field: value for field, value in recorded.items() if value != given[field]}


def weights_digest(source: str) -> str:
    """Identity of weights trained elsewhere: a digest of the file's content, or `pretrained`.

    Raises:
        ModelError: no such file.
    """
    if source == "pretrained":
        return source
    return hashlib.sha256(storage.read_bytes(_weights_file(source))).hexdigest()[:16]


def _weights_file(source: str) -> str:
    is_file = source.endswith((*_TORCH, ".safetensors"))
    url = source if is_file else storage.join(source, MODEL_NAME)
    if not storage.exists(url):
        found = "no such file" if is_file or not storage.exists(source) else f"has no {MODEL_NAME}"
        raise ModelError(
            f"weights {source!r}: {found}; expected a .safetensors, .pth, .pt or .pth.tar file, a weights folder or 'pretrained'"
        )
    return url


def _timm_pretrained(name: str, args: Mapping[str, Any], num_classes: int) -> dict[str, Tensor]:
    architecture, timm_args = timm_architecture(name, args)
    config = get_pretrained_cfg(name) or get_pretrained_cfg(architecture)
    if config is not None and config.num_classes != num_classes:  # timm would silently give a random classifier
        raise ModelError(
            f"timm's pretrained weights of {name} know {config.num_classes} classes, not {num_classes}; give a file as weights="
        )
    try:
        model = timm.create_model(name if timm.is_model(name) else architecture, pretrained=True, **timm_args)
    except Exception as error:  # the hub's client raises its own types for a missing network, repository or file
        raise ModelError(
            f"timm's pretrained weights of {name} cannot be had ({error}); give a file as weights="
        ) from error
    return dict(model.state_dict())


def _read_state(source: str) -> dict[str, Tensor]:
    url = _weights_file(source)
    return _read_safetensors(url) if url.endswith(".safetensors") else _read_torch(url)


def _read_safetensors(url: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(storage.read_bytes(url))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"{url}: not readable as safetensors ({error})") from error


def _read_torch(url: str) -> dict[str, Tensor]:
    file = storage.read_bytes(url)
    try:
        with torch.serialization.safe_globals([Namespace]):  # plain data: the arguments of timm's training script
            content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch, its unpickler and zlib raise types of a dozen modules
        raise ModelError(f"{url}: {_why_unreadable(file, error)}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(f"{url}: expected a state dict, or one under {', '.join(_WRAPPERS)}")
    # n_averaged: torch's AveragedModel counts its updates beside the weights
    return {key.removeprefix("module."): value for key, value in content.items() if key != "n_averaged"}


def _why_unreadable(file: bytes, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code or (isinstance(error, pickle.UnpicklingError) and file.startswith(_ZIP)):
        return (
            f"holds pickled code{f' ({code[1]})' if code else ''}, which is never run. Whoever trusts its maker can convert it, once:\n"
            "  import safetensors.torch, torch; content = torch.load('FILE', map_location='cpu', weights_only=False)\n"
            "  safetensors.torch.save_file(content.get('state_dict_ema') or content['state_dict'], 'FILE.safetensors')"
        )
    if file.startswith(_ZIP):
        return f"damaged ({error})"
    return f"not a file of torch.save (it begins with {file[:20]!r}); expected a state dict, or a training checkpoint with one"


def _same_in_order(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether only the names of layers differ: no name in common, and each tensor's kind (weight, …) and shape in order."""

    def kinds(tensors: dict[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], tensor.shape) for name, tensor in tensors.items()]

    return not state.keys() & wanted.keys() and kinds(state) == kinds(wanted)


def _by_order(source: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    logger.warning("%s has other names than the model, but each tensor's shape in order; loaded by order", source)
    return dict(zip(wanted, state.values(), strict=True))


def _by_name(source: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    if state.keys() == wanted.keys():
        wrong = [name for name in wanted if state[name].shape != wanted[name].shape]
        if not wrong:
            return state
        raise ModelError(
            f"{source}: other shapes than the model's for {_some(wrong)}; check model_args and the number of classes"
        )
    missing, unexpected = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    raise ModelError(f"{source} does not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}")


def _some(names: list[str]) -> str:
    return (
        ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        if names
        else "none"
    )
