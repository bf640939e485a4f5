"""The state of a training between two steps: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.training.ema import EMA

_PLAIN = ("step", "workers", "loss_sum", "loss_count", "metrics", "timing")


@dataclass
class State:
    """Together with a step's number, all that the step depends on.

    In several processes it is rank 0's: weights and momentum are the same in all, batch-norm statistics are taken from rank 0
    before every step, and the rest is rank 0's alone.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    workers: int = 1  # training processes
    loss_sum: float = 0.0  # since the last line of metrics
    loss_count: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)

    def as_checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values."""
        modules = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return modules | {name: getattr(self, name) for name in _PLAIN}

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Become what `as_checkpoint` returned. With another number of processes than then, which changes batch-norm statistics
        and rounding, a line of the metrics says so."""
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        workers = self.workers
        for name in _PLAIN:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))
        if self.workers != workers:
            self.workers = workers
            self.metrics.append({"step": self.step, "workers": workers})

    @property
    def best_step(self) -> int | None:
        """The step with the highest validation accuracy, the first of equal ones; None before any was measured."""
        measured = [(line["validation_top1"], -line["step"]) for line in self.metrics if "validation_top1" in line]
        return int(-max(measured)[1]) if measured else None
