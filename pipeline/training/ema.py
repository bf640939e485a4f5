"""An exponential moving average of a model's weights and batch-norm statistics: what labels and is evaluated."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def ema_decay(num_updates: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)) after t updates, as in ResNet-RS's code: short runs forget their start, too."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class EMA:
    """Keeps an averaged copy of a model, in eval mode, as `module`.

    Parameters and floating-point buffers (batch-norm statistics) are averaged, other buffers copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Begin with the model's present weights. `model` is the plain one, not its DistributedDataParallel wrapper."""
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights; call once after every optimizer step."""
        averages, values = _tensors(self.module), _tensors(model)
        floating = [index for index, value in enumerate(values) if value.is_floating_point()]
        weight = 1 - ema_decay(self.num_updates, self.decay)
        torch._foreach_lerp_([averages[index] for index in floating], [values[index] for index in floating], weight)
        for average, value in zip(averages, values, strict=True):
            if not value.is_floating_point():
                average.copy_(value)
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly: {"module": tensors, "num_updates": int}."""
        return {"module": self.module.state_dict(), "num_updates": self.num_updates}

    @staticmethod
    def weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The averaged weights in what `state_dict` returned: a state dict of the plain model."""
        weights: dict[str, torch.Tensor] = state["module"]
        return weights

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.module.load_state_dict(state["module"])
        self.num_updates = int(state["num_updates"])


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Looked up anew each time: `module.to(device)` replaces buffers."""
    return [*module.parameters(), *module.buffers()]
