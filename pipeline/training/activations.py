"""Activation checkpointing: keep each block's input alone, and compute the block again in the backward pass (arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.training.job import TrainingError

_NO_BACKWARD = -1  # of `_current_graph_task_id`


def checkpoint_activations(model: nn.Module, section: str, compiled: bool = False) -> None:
    """Let the model's blocks compute their activations again in the backward pass. Gradients and statistics stay the same bits.

    The second computation draws the same dropout and stochastic depth. Batch norms leave their running statistics alone in it (with
    momentum below 1, another update would change them); torch.compile sees to that itself.

    Args:
        section: of the configuration, for the message.
        compiled: the model will be.

    Raises:
        TrainingError: a timm model that cannot.
    """
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]  # timm's interface, which ResNetRS has, too
    except (AttributeError, AssertionError):
        raise TrainingError(
            f"{section}.checkpoint_activations=true: timm cannot do so for {type(model).__name__}; give a larger "
            f"{section}.accumulate_steps instead"
        ) from None
    for module in () if compiled else model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(partial(_update_statistics_once, module.momentum))


def _update_statistics_once(momentum: float | None, norm: _BatchNorm, inputs: Any) -> None:  # noqa: ARG001 (torch's interface)
    """Give a norm its momentum in the forward pass, and 0 in a backward pass, which is the second computation.

    Without statistics at all, the second computation would save fewer tensors than the first, which torch refuses.
    """
    is_second = torch._C._current_graph_task_id() != _NO_BACKWARD
    norm.momentum = 0.0 if is_second else momentum
    if is_second and norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.sub_(1)  # it is about to add 1
