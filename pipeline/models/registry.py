"""Models by name: the ResNet-RS family, or anything that timm has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.settings import nearest
from pipeline.models.resnet_rs import BLOCKS, Architecture, ModelError, ResNetRS, resnet_rs, timm_args

_FAMILY = re.compile(r"resnetrs(\d+)")


def build_model(
    name: str, num_classes: int, args: Mapping[str, Any], dropout: float = 0.0, stochastic_depth: float = 0.0
) -> nn.Module:
    """A model with fresh weights.

    Args:
        name: `resnetrs26` … `resnetrs420` (this project's own), or a timm model.
        args: for ResNet-RS, fields of `Architecture` (width, blocks, …); for timm, arguments of its `create_model`.
        dropout: before the classifier.
        stochastic_depth: drop rate of the last blocks: constant in a stage for ResNet-RS, as published; timm's own rule otherwise.

    Raises:
        ModelError: no such model, or an argument that it does not take.
    """
    if (family := _FAMILY.fullmatch(name)) is not None and int(family[1]) in BLOCKS:
        try:
            return resnet_rs(int(family[1]), num_classes, dropout=dropout, stochastic_depth=stochastic_depth, **args)
        except TypeError as error:
            raise ModelError(
                f"model_args of {name}: {error}; expected some of width, blocks, in_chans, se_ratio, resnet_d, stem"
            ) from error
    if not timm.is_model(name):
        known = [*(f"resnetrs{depth}" for depth in BLOCKS), *timm.list_models()]
        raise ModelError(f"model {name!r}: neither ResNet-RS nor a timm model{nearest(name, known)}")
    noise = {"drop_rate": dropout, "drop_path_rate": stochastic_depth}
    # a rate of 0 is left out: not every timm model takes each
    model = _create_timm(name, num_classes, dict(args) | {key: rate for key, rate in noise.items() if rate})
    _check_noise(model, name, dropout, stochastic_depth)
    return model


def _create_timm(name: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **args)
    except TypeError as error:
        raise ModelError(
            f"{name} does not take one of {', '.join(args)} ({error}); set it to 0 or leave it out of model_args"
        ) from error
    return model


def _check_noise(model: nn.Module, name: str, dropout: float, stochastic_depth: float) -> None:
    """A model that takes a rate and never applies it would train without noise, and no one would notice."""
    modules = list(model.modules())
    drops_paths = any(isinstance(module, DropPath) and module.drop_prob for module in modules)
    if stochastic_depth and not drops_paths:
        raise ModelError(f"stochastic_depth={stochastic_depth}: timm's {name} has no place for it; set it to 0")
    drops = any(isinstance(module, nn.Dropout) and module.p == dropout for module in modules)
    if dropout and not drops and not any(getattr(module, "drop_rate", None) == dropout for module in modules):
        raise ModelError(f"dropout={dropout}: timm's {name} has no place for it; set it to 0")


def timm_architecture(name: str, args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name and `create_model` arguments (JSON values) of the network that `build_model(name, …, args)` makes."""
    family = _FAMILY.fullmatch(name)
    if family is not None and int(family[1]) in BLOCKS:
        return timm_args(Architecture(int(family[1]), **args))
    return name, dict(args)


def can_warm_start(teacher: nn.Module, student: nn.Module) -> bool:
    """True for ResNet-RS models of which a fresh `student` with all of `teacher`'s weights computes what `teacher` does.

    It may have further blocks in its stages: those begin as their shortcuts. Nothing else may differ.
    """
    if not (isinstance(teacher, ResNetRS) and isinstance(student, ResNetRS)):
        return False
    theirs, ours = teacher.architecture, student.architecture
    same = replace(theirs, depth=ours.depth, blocks=ours.blocks) == ours
    return same and all(more >= fewer for more, fewer in zip(ours.stage_blocks, theirs.stage_blocks, strict=True))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without memory or values: for counting."""
    with torch.device("meta"):
        return build()


def count_parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs (2 × multiply-adds, convolutions and matrix products) of one image_size × image_size image in eval mode."""
    parameter = next(model.parameters())
    image = torch.zeros(
        1, getattr(model, "in_chans", 3), image_size, image_size, device=parameter.device, dtype=parameter.dtype
    )
    was_training = {module: module.training for module in model.modules()}  # frozen batch norms stay frozen
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    for module, training in was_training.items():
        module.training = training
    return int(counter.get_total_flops())
