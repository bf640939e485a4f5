"""Models by name: this project's ResNet-RS family, or any timm model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.settings import nearest
from pipeline.models.resnet3d_rs import CLIP_MODELS, is_clip_model, named_clip_model
from pipeline.models.resnet_rs import BLOCKS, Architecture, ModelError, ResNetRS, resnet_rs, timm_args
from pipeline.models.timm_models import build_timm_model


def build_model(
    name: str, num_classes: int, args: Mapping[str, Any], dropout: float = 0.0, stochastic_depth: float = 0.0
) -> nn.Module:
    """A model with fresh weights.

    Args:
        name: `resnetrs26` … `resnetrs420` (this project's own), or a timm model; for clips one of `CLIP_MODELS`.
        args: for ResNet-RS, fields of `Architecture` (width, blocks, …), of 3D ResNet-RS of `ClipArchitecture`; for timm, arguments
            of its `create_model`.
        dropout: before the classifier.
        stochastic_depth: drop rate of the last blocks. Earlier blocks: by `stage_drop_rates` for ResNet-RS, by timm's rule otherwise.

    Raises:
        ModelError: an unknown model, or an argument or rate that it does not take.
    """
    if is_clip_model(name):
        rates = {"dropout": dropout, "stochastic_depth": stochastic_depth}
        return named_clip_model(name, num_classes, args, **rates)
    depth = _resnet_rs_depth(name)
    if depth is None:
        if not timm.is_model(name):
            known = [*CLIP_MODELS, *(f"resnetrs{depth}" for depth in BLOCKS), *timm.list_models()]
            raise ModelError(f"model {name!r}: neither ResNet-RS nor a timm model{nearest(name, known)}")
        return build_timm_model(name, num_classes, args, dropout, stochastic_depth)
    try:
        return resnet_rs(depth, num_classes, dropout=dropout, stochastic_depth=stochastic_depth, **args)
    except TypeError as error:
        raise ModelError(
            f"model_args of {name}: {error}; expected some of width, blocks, in_chans, se_ratio, resnet_d, stem"
        ) from error


def timm_architecture(name: str, args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """timm's name and `create_model` arguments (JSON values) for the network that `build_model(name, …, args)` builds."""
    depth = _resnet_rs_depth(name)
    return (name, dict(args)) if depth is None else timm_args(Architecture(depth, **args))


def timm_record(name: str, args: Mapping[str, Any]) -> PretrainedCfg | None:
    """What timm records of its own weights of the network that `build_model(name, …, args)` builds; None of a network it lacks."""
    return get_pretrained_cfg(name) or get_pretrained_cfg(timm_architecture(name, args)[0])


def _resnet_rs_depth(name: str) -> int | None:
    """The depth in the name of a ResNet-RS; None for other models."""
    match = re.fullmatch(r"resnetrs(\d+)", name)
    return int(match[1]) if match is not None and int(match[1]) in BLOCKS else None


def can_warm_start(teacher: nn.Module, student: nn.Module) -> bool:
    """True where a fresh `student` with all of `teacher`'s weights computes the same function: equal ResNet-RS models, or a student
    with more blocks per stage (fresh blocks begin as their shortcuts) and otherwise equal.
    """
    if not (isinstance(teacher, ResNetRS) and isinstance(student, ResNetRS)):
        return False
    theirs, ours = teacher.architecture, student.architecture
    same = replace(theirs, depth=ours.depth, blocks=ours.blocks) == ours
    return same and all(more >= fewer for more, fewer in zip(ours.stage_blocks, theirs.stage_blocks, strict=True))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` returns, on the meta device: shapes without memory, for counting."""
    with torch.device("meta"):
        return build()


def count_parameters(model: nn.Module) -> int:
    """Trainable and frozen parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, view_shape: int | Sequence[int]) -> int:
    """FLOPs (2 × multiply-adds of convolutions and matrix products) of one sample in eval mode.

    Args:
        view_shape: (frames, 3, S, S) of a clip; (3, S, S) of an image, or S alone.
    """
    parameter = next(model.parameters())
    *frames, side = [view_shape] if isinstance(view_shape, int) else [*view_shape[:-3], view_shape[-1]]
    shape = (1, *frames, getattr(model, "in_chans", 3), side, side)
    image = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
    was_training = {module: module.training for module in model.modules()}  # frozen batch norms stay in eval mode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(image)
    for module, training in was_training.items():
        module.training = training
    return int(counter.get_total_flops())
