"""Bring weights that were trained elsewhere into the data's order of classes.

A label is a position in a list of class names. data.pack sorts class names as text (1, 10, 2); timm sorts class folders naturally and
without case (1, 2, 10). Weights keep the order they were trained with.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data import storage
from data.json_files import read_json
from data.settings import UsageError
from pipeline.models.external_weights import PRETRAINED, some_names
from pipeline.models.heads import head_layers
from pipeline.models.registry import build_model, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import CONFIG_NAME, OURS

logger = logging.getLogger(__name__)


def class_order(source: str, listed: str | None, data_names: Sequence[str] | None) -> list[int] | None:
    """Position of each of the data's classes in the weights' outputs; None where the order is the same or unknown.

    Args:
        source: of the weights. The config.json of a folder may name the classes: this pipeline's `class_names` or timm's `label_names`.
        listed: text file with one class name per line (`teacher.class_names`); overrides config.json.
        data_names: in the order of the labels.

    Raises:
        UsageError: `listed` cannot be read or has a name twice, or the data's class names are unknown.
        ModelError: config.json cannot be read, or the class names are not the data's.
    """
    if listed is not None:
        if not data_names:
            raise UsageError(
                f"teacher.class_names={listed}: the data's class names are not known, as its shards have no manifest of data.pack; "
                "leave the list out, and give labels in the weights' order"
            )
        return _order(_read_list(listed), f"teacher.class_names={listed}", data_names)
    url = storage.join(source, CONFIG_NAME)
    if source == PRETRAINED or not data_names or not storage.exists(url):
        return None
    names, ours = names_in(url)
    if names is not None and not ours and set(names) != set(data_names):
        logger.warning("%s: its label_names are not the data's class names; taken to be in the same order", url)
        return None
    return _order(names, url, data_names) if names is not None else None


def _read_list(url: str) -> list[str]:
    """Class names from a text file, one per line."""
    if not storage.exists(url):
        raise UsageError(f"teacher.class_names={url}: no such file; give the weights' class names, one a line")
    try:
        text = storage.read_text(url)
    except UnicodeDecodeError as error:
        raise UsageError(f"teacher.class_names={url}: not a text file in UTF-8 ({error})") from None
    names = [line.rstrip("\r") for line in text.removeprefix("\ufeff").rstrip("\r\n").split("\n")]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"teacher.class_names={url}: {twice[0]!r} is there twice; expected each class once, one a line"
        )
    return names


def names_in(url: str) -> tuple[list[str] | None, bool]:
    """Class names in a config.json, and whether this pipeline wrote it. Raises ModelError when it cannot be read."""
    content = read_json(url, "bring the weights folder again", error=ModelError)
    ours = OURS in content
    try:
        names = content[OURS]["class_names"] if ours else content.get("label_names")
    except (KeyError, TypeError) as error:
        raise ModelError(f"{url}: damaged ({type(error).__name__}: {error}); bring the weights folder again") from error
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None, ours


def _order(names: Sequence[str], source: str, data_names: Sequence[str]) -> list[int] | None:
    """Position of each data name in `names`; None for the identity."""
    missing = [repr(name) for name in data_names if name not in names]
    more = [repr(name) for name in names if name not in data_names]
    if missing or more:
        raise ModelError(
            f"{source}: the data's classes {some_names(missing)} are missing there, and {some_names(more)} are not in the data; "
            "expected the names of the data's class folders, in the order of the weights' outputs"
        )
    position = {name: place for place, name in enumerate(names)}
    order = [position[name] for name in data_names]
    return None if order == list(range(len(order))) else order


def reorder_classes(
    name: str, args: Mapping[str, Any], state: Mapping[str, Tensor], order: Sequence[int], image_size: int
) -> dict[str, Tensor]:
    """The weights with output `order[i]` moved to position i.

    Args:
        name, args: of the model, see `build_model`.
        image_size: pixels; one image of noise checks the result.

    Raises:
        ModelError: the outputs are not the rows of one classifier layer.
    """
    moved = dict(state)
    for layer in head_layers(on_meta(lambda: build_model(name, len(order), args))):
        for part in (f"{layer}.weight", f"{layer}.bias"):
            if part in moved and len(moved[part]) == len(order):
                moved[part] = moved[part][list(order)].clone()
    example = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    before, after = (_outputs(name, args, weights, len(order), example) for weights in (state, moved))
    if not torch.allclose(before[:, list(order)], after, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{name}: its classes cannot be brought into the data's order, as its outputs are not the rows of one classifier; "
            "pack the data with class folders that sort as text in the weights' order"
        )
    return moved


@torch.inference_mode()
def _outputs(
    name: str, args: Mapping[str, Any], state: Mapping[str, Tensor], num_classes: int, example: Tensor
) -> Tensor:
    model = build_model(name, num_classes, args)
    model.load_state_dict(dict(state))
    outputs: Tensor = model.eval()(example)
    return outputs
