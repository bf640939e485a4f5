"""Count the memory that a training process, or a model that predicts, takes of one GPU. Needs no GPU, and no Ray.

docs/training.md ("When it does not fit") explains the parts. What cannot be counted is an allowance: `workspace`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from torch import nn

from pipeline.core.schema import PretrainConfig, TrainConfig
from pipeline.models.memory import PassMemory, count_pass
from pipeline.models.registry import build_model
from pipeline.training.activations import checkpoint_activations
from pipeline.training.objectives.choice import build_network
from pipeline.training.optimizer import state_per_parameter
from pipeline.training.state import freeze_early_layers
from pipeline.training.step import to_training_mode

_FLOAT = 4  # bytes
_WORKSPACE, _UNUSED = (
    2e9,
    0.05,
)  # context, kernels and convolution workspaces; share of the rest that the allocator holds unused
_OF_NETWORK = {
    "model", "model_args", "image_size", "clip", "dropout", "stochastic_depth", "objective", "projection_dim", "projection_hidden",
}  # fmt: skip  # fields that decide a pretraining's network
_Kind = Literal["trains", "frozen", "infers"]


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU at the peak of a stage, by what is in them.

    Attributes:
        images: images of one pass: of a micro-batch in training.
        per_image: activations per image: kept for the backward pass in training, else at the peak of the forward pass.
        gradients: with several training processes they are DDP's buckets, of which each parameter's gradient is a view.
        optimizer: its state, as momentum.
        activations: of a pass at its peak, with weights cast to bf16.
        inputs: pixels and targets of a step, and the images of a pass as floats.
    """

    images: int
    per_image: float
    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    inputs: float

    @property
    def workspace(self) -> float:
        """What is not counted: libraries, and what the allocator holds unused. An allowance."""
        return _WORKSPACE + _UNUSED * self._counted

    @property
    def total(self) -> float:
        """All of it."""
        return self._counted + self.workspace

    @property
    def _counted(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations + self.inputs


def training_memory(section: TrainConfig, num_classes: int, kind: Literal["trains", "frozen"] = "trains") -> GpuMemory:
    """A step of one training process.

    Args:
        kind: `frozen` for the epochs at another resolution, which train the last layers alone.

    Raises:
        RuntimeError: the model cannot be counted.
        TrainingError: its activations are to be checkpointed, and cannot.
    """
    counted, images = _count(section, num_classes, kind), section.batch_size // section.workers
    images *= section.views
    at_once = math.ceil(images / section.accumulate_steps)
    return GpuMemory(
        images=at_once,
        per_image=counted.kept_per_image,
        weights=counted.weights,
        gradients=counted.trained,
        optimizer=counted.trained * state_per_parameter(section.optimizer, section.momentum),
        ema=counted.weights,
        activations=counted.peak(at_once),
        inputs=_pixels(section, images)
        + _FLOAT * (_pixels(section, at_once) + images * num_classes + _similarities(section)),
    )


def evaluation_memory(section: TrainConfig, num_classes: int, batch_size: int) -> GpuMemory:
    """A training process while it evaluates the EMA weights. Raises RuntimeError as `training_memory`."""
    predicts = inference_memory(section, num_classes, batch_size)
    return replace(
        training_memory(section, num_classes),
        images=batch_size,
        per_image=predicts.per_image,
        activations=predicts.activations,
        inputs=predicts.inputs,
    )


def inference_memory(section: TrainConfig, num_classes: int, batch_size: int) -> GpuMemory:
    """A model that predicts batches of pixels. Raises RuntimeError when it cannot be counted."""
    counted = _count(section, num_classes, "infers")
    inputs = _pixels(section, batch_size) * (
        2 + 2 * _FLOAT
    )  # pixels of two batches; one batch as floats, and a view of it
    return GpuMemory(batch_size, counted.per_image, counted.weights, 0, 0, 0, counted.peak(batch_size), inputs)


def _similarities(section: TrainConfig) -> int:
    """Values of the matrices in which a contrastive loss compares all views of the whole batch: at once four of them."""
    return 4 * (section.views * section.batch_size) ** 2 if section.compares_images else 0


def _pixels(section: TrainConfig, images: int) -> int:
    return images * math.prod(section.view_shape)


def _count(section: TrainConfig, num_classes: int, kind: _Kind) -> PassMemory:
    return _count_model(
        section.model,
        json.dumps(section.model_args, sort_keys=True),
        num_classes,
        section.view_shape,
        section.precision == "bf16",
        (section.dropout, section.stochastic_depth) if kind == "trains" else (0.0, 0.0),
        kind,
        section.checkpoint_activations and kind != "infers",
        section.model_dump_json(include=_OF_NETWORK)
        if isinstance(section, PretrainConfig) and kind != "infers"
        else "",
    )


@cache
def _count_model(
    model: str,
    arguments: str,
    num_classes: int,
    view_shape: tuple[int, ...],
    bf16: bool,
    rates: tuple[float, float],
    kind: _Kind,
    checkpoints: bool,
    pretraining: str,
) -> PassMemory:
    """Count a model; `pretraining`: the fields of one, as JSON, whose network is another one."""

    def build() -> nn.Module:
        if pretraining:
            built = build_network(PretrainConfig.model_validate_json(pretraining), num_classes)
        else:
            built = build_model(model, num_classes, json.loads(arguments), *rates)
        if kind == "frozen":
            freeze_early_layers(built)
        if checkpoints:
            checkpoint_activations(built, "teacher or student")
        return built.eval() if kind == "infers" else to_training_mode(built)

    return count_pass(build, view_shape, bf16, kind != "infers")
