"""An exponential moving average of a model's weights and batch-norm statistics, for labeling and evaluation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def ema_decay(num_updates: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)) after t updates, as in ResNet-RS's code: so that short runs forget their start, too."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class EMA:
    """Keeps an averaged copy of a model, `module`, in eval mode.

    Average parameters and floating-point buffers (batch-norm statistics); copy other buffers.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the weights of `model`: the plain one, not its DistributedDataParallel wrapper."""
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights. Call once after every optimizer step."""
        averages, values = _tensors(self.module), _tensors(model)
        floating = [index for index, value in enumerate(values) if value.is_floating_point()]
        weight = 1 - ema_decay(self.num_updates, self.decay)
        torch._foreach_lerp_([averages[index] for index in floating], [values[index] for index in floating], weight)
        for average, value in zip(averages, values, strict=True):
            if not value.is_floating_point():
                average.copy_(value)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`: {"module": state dict of the averaged model, "num_updates": int}."""
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.num_updates = int(state["num_updates"])


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers. Not cached: `module.to(device)` replaces buffers."""
    return [*module.parameters(), *module.buffers()]
