"""Models by name: families of networks (`FAMILIES`), or any timm model.

A family is a row of the table: which names it has, how they are built, what timm calls them, and which student can begin as its
teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.settings import nearest
from pipeline.models import efficientnet
from pipeline.models.resnet3d_rs import CLIP_MODELS, named_clip_model
from pipeline.models.resnet_rs import BLOCKS, Architecture, ModelError, ResNetRS, resnet_rs, timm_args
from pipeline.models.timm_models import build_timm_model

Args = Mapping[str, Any]


def _never(teacher: nn.Module, student: nn.Module) -> bool:  # noqa: ARG001 (a family's rule)
    return False


@dataclass(frozen=True)
class Family:
    """Networks that differ in size alone.

    Attributes:
        names: of its models.
        build: (name, num_classes, args, dropout, stochastic_depth) → a model with fresh weights; see `build_model`.
        timm_names: (name, args) → timm's name and `create_model` arguments (JSON values) of the same network.
        can_warm_start: see the function of this name; of two different networks.
        warm_start: that rule in words, for the refusal of `student.init=teacher`.
    """

    names: tuple[str, ...]
    build: Callable[[str, int, Args, float, float], nn.Module]
    timm_names: Callable[[str, Args], tuple[str, dict[str, Any]]]
    can_warm_start: Callable[[nn.Module, nn.Module], bool] = _never
    warm_start: str = ""


def build_model(
    name: str, num_classes: int, args: Args, dropout: float = 0.0, stochastic_depth: float = 0.0
) -> nn.Module:
    """A model with fresh weights.

    Args:
        name: `resnetrs26` … `resnetrs420` (this project's own), `efficientnetrs_b0` … `b7`, for clips one of `CLIP_MODELS`, or a
            timm model.
        args: for ResNet-RS, fields of `Architecture` (width, blocks, …), of 3D ResNet-RS of `ClipArchitecture`; for others, those of
            timm's `create_model`.
        dropout: before the classifier.
        stochastic_depth: drop rate of the last blocks. Earlier blocks: by `stage_drop_rates` for ResNet-RS; by timm's rule otherwise,
            which grows linearly from block to block, as EfficientNet has it.

    Raises:
        ModelError: an unknown model, or an argument or rate that it does not take.
    """
    family = family_of(name)
    if family is not None:
        return family.build(name, num_classes, args, dropout, stochastic_depth)
    if not timm.is_model(name):
        known = [*(name for family in FAMILIES for name in family.names), *timm.list_models()]
        raise ModelError(
            f"model {name!r}: neither ResNet-RS, EfficientNet-RS nor a timm model{nearest(name, list(dict.fromkeys(known)))}"
        )
    return build_timm_model(name, num_classes, args, dropout, stochastic_depth)


def family_of(name: str) -> Family | None:
    """The family that has a model of this name; None for timm's others, and names with the tag of timm's weights (`.ns_jft_in1k`)."""
    return next((family for family in FAMILIES if name in family.names), None)


def timm_architecture(name: str, args: Args) -> tuple[str, dict[str, Any]]:
    """timm's name and `create_model` arguments (JSON values) for the network that `build_model(name, …, args)` builds."""
    family = family_of(name)
    return (name, dict(args)) if family is None else family.timm_names(name, args)


def timm_record(name: str, args: Args) -> PretrainedCfg | None:
    """What timm records of its own weights of the network that `build_model(name, …, args)` builds; None of a network it lacks."""
    return get_pretrained_cfg(name) or get_pretrained_cfg(timm_architecture(name, args)[0])


def can_warm_start(teacher: nn.Module, student: nn.Module) -> bool:
    """True where a fresh `student` with all of `teacher`'s weights computes the same function, by the rule of a family."""
    return any(family.can_warm_start(teacher, student) for family in FAMILIES)


def _resnet_rs(name: str, num_classes: int, args: Args, dropout: float, stochastic_depth: float) -> nn.Module:
    try:
        return resnet_rs(_depth(name), num_classes, dropout=dropout, stochastic_depth=stochastic_depth, **args)
    except TypeError as error:
        raise ModelError(
            f"model_args of {name}: {error}; expected some of width, blocks, in_chans, se_ratio, resnet_d, stem"
        ) from error


def _depth(name: str) -> int:
    return int(name.removeprefix("resnetrs"))


def _resnet_rs_grows(teacher: nn.Module, student: nn.Module) -> bool:
    """True for equal models, and for a student with more blocks per stage (fresh blocks begin as their shortcuts), otherwise equal."""
    if not (isinstance(teacher, ResNetRS) and isinstance(student, ResNetRS)):
        return False
    theirs, ours = teacher.architecture, student.architecture
    same = replace(theirs, depth=ours.depth, blocks=ours.blocks) == ours
    return same and all(more >= fewer for more, fewer in zip(ours.stage_blocks, theirs.stage_blocks, strict=True))


FAMILIES: tuple[Family, ...] = (
    Family(
        names=tuple(f"resnetrs{depth}" for depth in BLOCKS),
        build=_resnet_rs,
        timm_names=lambda name, args: timm_args(Architecture(_depth(name), **args)),
        can_warm_start=_resnet_rs_grows,
        warm_start="a ResNet-RS may have more blocks, otherwise the same",
    ),
    Family(
        names=efficientnet.NAMES,
        build=lambda name, *others: build_timm_model(efficientnet.timm_name(name), *others),
        timm_names=lambda name, args: (efficientnet.timm_name(name), dict(args)),
        warm_start="a deeper or wider EfficientNet has other channels, so it cannot begin as a smaller one",
    ),
    Family(
        names=CLIP_MODELS,
        build=named_clip_model,
        timm_names=lambda name, args: (name, dict(args)),  # which timm lacks
        warm_start="a 3D ResNet-RS begins as none but itself",
    ),
)


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
