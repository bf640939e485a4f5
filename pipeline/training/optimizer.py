"""Optimizers by name, without weight decay on norms; learning rate with linear warm-up, then cosine or steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.heads import head_parameters

Schedule = Literal["cosine", "step", "exponential"]
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)
"""Normalization layers, whose parameters have no weight decay."""
_DROPS = (1 / 3, 2 / 3, 8 / 9)  # of the run: epochs 30, 60 and 80 of a ResNet's 90 (arXiv 1706.02677, section 5.1)
_DECAY, _DECAY_EPOCHS = 0.97, 2.4  # EfficientNet's released code


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    schedule: Schedule = "cosine",
    steps_per_epoch: float = 1.0,
) -> float:
    """Learning rate of a step (0 to total_steps − 1): linear from 0 to `peak`, then by the schedule.

    `cosine`: half a cosine from `peak` towards 0. `step`: `peak`, divided by ten after 1/3, 2/3 and 8/9 of the run, as for ResNets.
    `exponential`: `peak`, times 0.97 after every 2.4 epochs, counted from step 0, as for EfficientNets.
    Raises ValueError when the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps must be 0 to {total_steps} (total_steps), but is {warmup_steps}; shorten it")
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "step":
        return peak * 0.1 ** sum(step >= drop * total_steps for drop in _DROPS)
    if schedule == "exponential":
        return float(peak * _DECAY ** math.floor(step / (_DECAY_EPOCHS * steps_per_epoch)))
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class _Optimizer:
    """One optimizer.

    Attributes:
        timm_name: for timm's factory.
        state: values kept per parameter, besides those of momentum.
        options: of torch or timm.
        decays_biases: False where published with neither decay nor adaptation of biases.
    """

    timm_name: str
    state: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    decays_biases: bool = True


_OPTIMIZERS = {
    # `fused` takes a third of the plain loop's time on a CPU, `foreach` up to twice its time (25 M parameters, 2 threads)
    "momentum": _Optimizer("momentum", options={"fused": True}),
    "nesterov": _Optimizer("sgd", options={"fused": True}),
    "rmsprop": _Optimizer("rmsproptf", 1, {"alpha": 0.9, "eps": 1e-3}),  # EfficientNet's released code
    "adamw": _Optimizer("adamw", 2, {"fused": True}),
    "lars": _Optimizer("lars", options={"trust_coeff": 1e-3}, decays_biases=False),  # SimCLR's released code
}


def state_per_parameter(name: str, momentum: float) -> int:
    """Float32 values that an optimizer (a value of the field `optimizer`) keeps for each trained parameter."""
    return _OPTIMIZERS[name].state + (name != "adamw" and momentum > 0)


def parameter_groups(
    model: nn.Module, weight_decay: float, decays_biases: bool = True, head_lr_scale: float | None = None
) -> list[dict[str, Any]]:
    """Two groups, in the model's order: parameters with weight decay (also biases, as published), and those of normalization layers.

    Frozen parameters are in neither; shared ones come once.

    Args:
        decays_biases: False moves parameters of one dimension to the second group.
        head_lr_scale: if given, the head's parameters are in groups of their own with this `lr_scale`.
    """
    decayed: dict[nn.Parameter, None] = {}
    undecayed: dict[nn.Parameter, None] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            decays = not isinstance(module, NORMS) and (decays_biases or parameter.ndim > 1)
            if parameter.requires_grad:
                (decayed if decays else undecayed)[parameter] = None
    groups = [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return groups if head_lr_scale is None else _with_head_apart(groups, head_parameters(model), head_lr_scale)


def _with_head_apart(
    groups: list[dict[str, Any]], head: set[nn.Parameter], head_lr_scale: float
) -> list[dict[str, Any]]:
    parts = [(group, is_head) for is_head in (False, True) for group in groups]
    split = [
        group
        | {
            "params": [p for p in group["params"] if (p in head) == is_head],
            "lr_scale": head_lr_scale if is_head else 1.0,
        }
        for group, is_head in parts
    ]
    return [group for group in split if group["params"]]


def build_optimizer(
    model: nn.Module,
    momentum: float,
    weight_decay: float,
    name: str = "momentum",
    head_lr_scale: float | None = None,
) -> torch.optim.Optimizer:
    """An optimizer by timm's factory, with learning rate 0 until the schedule sets it.

    Args:
        momentum: of adamw: beta 1.
        name: a value of the field `optimizer`. `momentum` is plain, not Nesterov; `rmsprop` is TensorFlow's.
        head_lr_scale: see `parameter_groups`.
    """
    chosen = _OPTIMIZERS[name]
    groups = parameter_groups(model, weight_decay, chosen.decays_biases, head_lr_scale)
    options = chosen.options | ({"betas": (momentum, 0.999)} if name == "adamw" else {})
    if name == "lars":  # timm's leaves groups without weight decay as they are
        groups = [group | {"always_adapt": any(p.ndim > 1 for p in group["params"])} for group in groups]
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups, chosen.timm_name, lr=0.0, weight_decay=0.0, momentum=momentum, **options
    )
    return optimizer
