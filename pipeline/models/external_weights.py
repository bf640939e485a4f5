"""Weights trained elsewhere: a file, a weights folder or timm's pretrained weights, checked against the model they are for."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor

from data import storage
from pipeline.models.registry import build_model, on_meta, timm_architecture, timm_record
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import MODEL_NAME, read_safetensors

PRETRAINED = "pretrained"  # names timm's own weights
WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")  # timm's training script writes the last
_ZIP = b"PK\x03\x04"  # first bytes of a file of torch.save
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_SHOWN = 4  # names in an error

logger = logging.getLogger(__name__)


def load_external(name: str, args: Mapping[str, Any], num_classes: int, source: str) -> dict[str, Tensor]:
    """Read the state dict of a model trained elsewhere, and check that it fits the model.

    Args:
        name, args: of the model, see `build_model`.
        source: a .safetensors, .pth, .pt, .bin or .pth.tar file, a weights folder, or `pretrained` for timm's own.

    Raises:
        ModelError: the file cannot be read, holds pickled code, or does not fit the model.
    """
    if source == PRETRAINED:
        return _timm_pretrained(name, args, num_classes)
    state = read_state(source, name, args)
    _require_same_names(source, state, _shapes_of(name, num_classes, args))
    return state


def read_state(source: str, name: str, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the state dict in a file or a weights folder, whatever its number of classes.

    A torch file that has the model's tensors in the model's order, under other names, gets the model's names.

    Raises:
        ModelError: as `load_external`, but for a model that does not fit.
    """
    url = _weights_file(source)
    if url.endswith(".safetensors"):  # does not keep the order of its tensors
        return read_safetensors(url)
    state = _read_torch(url)
    last = next(reversed(state.values()), torch.empty(()))  # the classifier's, in the usual order
    expected = _shapes_of(name, len(last), args) if last.ndim and len(last) else {}
    if not _same_in_order(state, expected):
        return state
    logger.warning("%s has other names than the model, but each tensor's shape in order; loaded by order", source)
    return dict(zip(expected, state.values(), strict=True))


def _shapes_of(name: str, num_classes: int, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a model, on the meta device."""
    return dict(on_meta(lambda: build_model(name, num_classes, args)).state_dict())


def other_preprocessing(name: str, args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `given` fields (mean, std, …) where timm's own weights of the model have another value: field → timm's value."""
    known = timm_record(name, args)
    recorded = {field: getattr(known, field, value) for field, value in given.items()}
    return {field: value for field, value in recorded.items() if value != given[field]}


def weights_digest(source: str) -> str:
    """Identity of weights trained elsewhere: 16 hex digits of the file's sha256, or `pretrained`.

    Raises ModelError when there is no such file.
    """
    if source == PRETRAINED:
        return source
    return hashlib.sha256(storage.read_bytes(_weights_file(source))).hexdigest()[:16]


def _weights_file(source: str) -> str:
    """URL of the file of weights: `source`, or the one in the folder `source`. Raise ModelError where there is none."""
    is_file = source.endswith(WEIGHT_FILES)
    url = source if is_file else storage.join(source, MODEL_NAME)
    if not storage.exists(url):
        found = "no such file" if is_file or not storage.exists(source) else f"has no {MODEL_NAME}"
        raise ModelError(
            f"weights {source!r}: {found}; expected a .safetensors, .pth, .pt or .pth.tar file, a weights folder or 'pretrained'"
        )
    return url


def _timm_pretrained(name: str, args: Mapping[str, Any], num_classes: int) -> dict[str, Tensor]:
    config = timm_record(name, args)
    if config is not None and config.num_classes != num_classes:  # timm would silently give a random classifier
        raise ModelError(
            f"timm's pretrained weights of {name} know {config.num_classes} classes, not {num_classes}; give a file as weights=, "
            f"or train them with a new head: teacher.init={PRETRAINED}"
        )
    return pretrained_state(name, args, "teacher.weights")


def pretrained_state(name: str, args: Mapping[str, Any], field: str) -> dict[str, Tensor]:
    """The state dict of timm's own weights, from its cache or downloaded, with their own number of classes.

    Args:
        field: of the configuration that asks for them, for messages.

    Raises:
        ModelError: timm has none for the model, or they are not in the cache and cannot be downloaded.
    """
    architecture, timm_args = timm_architecture(name, args)
    chosen = name if timm.is_model(name) else architecture
    config = get_pretrained_cfg(chosen)
    if config is None or not config.has_weights:
        raise ModelError(f"{field}={PRETRAINED}: timm has no weights of {name}; give a file, or another model")
    try:
        return _create_pretrained(chosen, timm_args)
    except Exception as error:  # the hub's client raises its own types for a missing network, repository or file
        raise ModelError(_where_to_put(name, config, field, error)) from error


def _create_pretrained(chosen: str, timm_args: Mapping[str, Any]) -> dict[str, Tensor]:
    """With the arguments, to which timm adapts some weights (positions to an image size); without, where the network is another one."""
    try:
        return dict(timm.create_model(chosen, pretrained=True, **timm_args).state_dict())
    except RuntimeError:  # load_state_dict's
        if not timm_args:
            raise
        return dict(timm.create_model(chosen, pretrained=True).state_dict())


def _where_to_put(name: str, config: PretrainedCfg, field: str, error: Exception) -> str:
    """That weights could not be downloaded, and how to bring them."""
    head = f"{field}={PRETRAINED}: timm's weights of {name} are not in the cache and cannot be downloaded ({type(error).__name__})"
    if config.hf_hub_id:
        file = config.hf_hub_filename or MODEL_NAME
        return (
            f"{head}; on a machine with a network, download {file} of {config.hf_hub_id} from the Hugging Face hub, copy it here, and "
            f"give {field}=PATH/{file}"
        )
    file = str(config.url).rpartition("/")[2]
    return f"{head}; download {config.url} elsewhere, and put it here as {torch.hub.get_dir()}/checkpoints/{file}"


def _read_torch(url: str) -> dict[str, Tensor]:
    """Read a state dict, or one inside a training checkpoint, without running pickled code."""
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
    # torch's AveragedModel has a counter, n_averaged, beside the weights
    return {key.removeprefix("module."): value for key, value in content.items() if key != "n_averaged"}


def _why_unreadable(file: bytes, error: Exception) -> str:
    """Tell pickled code, a damaged file and a file of another kind apart."""
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


def _same_in_order(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """True when only the layers' names differ: no full name in common; last part of the name (weight, …) and shape equal, in order."""

    def kinds(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name.rpartition(".")[2], tensor.shape) for name, tensor in tensors.items()]

    return not state.keys() & expected.keys() and kinds(state) == kinds(expected)


def _require_same_names(source: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ModelError where names or shapes differ."""
    if state.keys() != expected.keys():
        missing, unexpected = [n for n in expected if n not in state], [n for n in state if n not in expected]
        raise ModelError(
            f"{source} does not fit the model: missing {some_names(missing)}; unexpected {some_names(unexpected)}"
        )
    if wrong := [name for name in expected if state[name].shape != expected[name].shape]:
        raise ModelError(
            f"{source}: other shapes than the model's for {some_names(wrong)}; check model_args and the number of classes"
        )


def some_names(names: Sequence[str]) -> str:
    """The first names, and how many more, for a message."""
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
