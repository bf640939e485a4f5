"""The state of a training between two steps: made new, saved in a checkpoint, restored from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.models.heads import head_parameters
from pipeline.models.resnet_rs import set_bn_momentum
from pipeline.training.checkpoint import load_newest
from pipeline.training.ema import EMA
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.objectives.choice import build_network
from pipeline.training.optimizer import NORMS, build_optimizer

_PLAIN = ("step", "workers", "loss_sum", "loss_count", "metrics", "timing")


@dataclass
class TrainState:
    """All that a step depends on, besides its number. Equal on all ranks, batch-norm statistics, too; rank 0's is saved."""

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    step: int = 0
    workers: int = 1  # training processes
    loss_sum: float = 0.0  # since the last line of metrics
    loss_count: int = 0
    metric_sums: dict[str, float] = field(default_factory=dict)  # of the objective, by name; as loss_sum
    metrics: list[dict[str, float]] = field(default_factory=list)
    timing: list[dict[str, float]] = field(default_factory=list)

    def as_checkpoint(self) -> dict[str, Any]:
        """Tensors and plain values."""
        modules = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        sums = {"metric_sums": self.metric_sums} if self.metric_sums else {}
        return modules | {name: getattr(self, name) for name in _PLAIN} | sums

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the values of `as_checkpoint`.

        Add a changed number of processes to the metrics: it changes rounding, and what dropout draws.
        """
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        workers = self.workers
        for name in _PLAIN:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))
        self.metric_sums = dict(checkpoint.get("metric_sums", {}))
        if self.workers != workers:
            self.workers = workers
            self.metrics.append({"step": self.step, "workers": workers})


def new_state(job: TrainJob, workers: int = 1) -> TrainState:
    """The state before the first step, on the job's device.

    Raises:
        TrainingError: the training that it starts from has not ended.
        ModelError: the weights that it begins with do not fit.
    """
    config = job.config
    torch.manual_seed(job.seed)
    model = build_network(config, job.num_classes)
    set_bn_momentum(model, config.bn_momentum)
    if job.initial is not None:
        job.initial.load_into(model, config.model, config.model_args)
    if job.starts_from is not None:
        model.load_state_dict(load_trained(job.starts_from)[0])
        freeze_early_layers(model)
    memory = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(job.device, memory_format=memory)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config.momentum, config.weight_decay, config.optimizer, job.head_lr_scale)
    return TrainState(model, EMA(model, config.ema_decay), optimizer, workers=workers)


def load_trained(job: TrainJob) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """EMA weights (a state dict) and metrics of a finished training. Raises TrainingError when it has not reached its last step."""
    checkpoint = load_newest(job.checkpoints)
    if checkpoint is None or checkpoint["step"] != job.total_steps:
        raise TrainingError(
            f"{job.folder}: training has not reached step {job.total_steps}; run the stage again to continue"
        )
    return checkpoint["ema"]["module"], checkpoint["metrics"]


def freeze_backbone(model: nn.Module, frozen: bool) -> None:
    """Freeze or unfreeze all parameters but those of the head. Takes effect on batch norms with the next `to_training_mode`."""
    head = head_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in head or not frozen)


def freeze_early_layers(model: nn.Module) -> None:
    """Freeze all parameters before the model's last normalization layer; none if it has no such layer."""
    last = next((module for module in reversed(list(model.modules())) if isinstance(module, NORMS)), None)
    trained = last is None
    for module in model.modules():
        trained = trained or module is last
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(trained)
