"""What a training is, as plain data that travels to every training process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from data import storage
from data.shards.split import Split
from pipeline.core.schema import Config, PretrainConfig, TrainConfig
from pipeline.inputs.streams import StreamSpec
from pipeline.models.initial_weights import InitialWeights
from pipeline.training.optimizer import learning_rate


class TrainingError(ValueError):
    """Training that cannot go on; the message says where and why."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training. Its objective follows from the type of `config`.

    Attributes:
        name: section of the configuration, for messages.
        folder: where checkpoints and metrics are written, a path or URL.
        streams: the labeled one first; a pretraining has one, of all images.
        num_classes: 0 for a pretraining.
        num_labeled: images in an epoch: the labeled ones, or all of a pretraining.
        threads: of torch, per process.
        validation: labeled images to evaluate on; None: no evaluation.
        initial: weights to begin with.
        starts_from: a finished training; begin with its EMA weights and train only the last layers (`student.fix_resolution`).
    """

    name: str
    folder: str
    config: TrainConfig
    streams: tuple[StreamSpec, ...]
    num_classes: int
    num_labeled: int
    seed: int
    threads: int
    device: str
    validation: Split | None = None
    initial: InitialWeights | None = None
    starts_from: TrainJob | None = None

    @property
    def images_per_step(self) -> int:
        """Images of all streams and ranks."""
        return sum(stream.images_per_step for stream in self.streams)

    @property
    def steps_per_epoch(self) -> float:
        """Steps per pass over the labeled images."""
        return self.num_labeled / self.streams[0].images_per_step

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return num_steps(self.config.epochs, self.steps_per_epoch)

    @property
    def frozen_steps(self) -> int:
        """First steps, in which only the head is trained."""
        epochs = self.config.freeze_backbone_epochs if self.initial is not None else 0.0
        return math.ceil(epochs * self.steps_per_epoch)

    @property
    def head_lr_scale(self) -> float | None:
        """Of groups of parameters that the head has for itself; None where it needs none.

        It needs them while all else is frozen, too: torch's SGD wants momentum for all parameters of a group, or for none.
        """
        scale = self.config.init_head_lr_scale
        return scale if self.initial is not None and (scale != 1 or self.config.freeze_backbone_epochs) else None

    @property
    def checkpoints(self) -> str:
        """Folder of the checkpoints."""
        return storage.join(self.folder, "checkpoints")

    def ema_decay(self, step: int) -> float:
        """Limit of the EMA's decay at a step: constant, but for BYOL's average network, whose decay rises to 1.

        On half a cosine: 1 − (1 − decay) · (cos(π · step / total_steps) + 1) / 2 (arXiv 2006.07733, section 3.3).
        """
        decay = self.config.ema_decay
        if not isinstance(self.config, PretrainConfig) or self.config.objective != "byol":
            return decay
        return 1 - (1 - decay) * (math.cos(math.pi * step / self.total_steps) + 1) / 2

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step (0 to total_steps − 1); `config.lr` is per 256 images, as published."""
        config = self.config
        peak = config.lr * config.batch_size / 256
        warmup_steps = round(config.warmup_epochs * self.steps_per_epoch)
        return learning_rate(
            step, self.total_steps, warmup_steps, peak, config.lr_schedule, steps_per_epoch=self.steps_per_epoch
        )


def num_steps(epochs: float, steps_per_epoch: float) -> int:
    """Steps of a whole training: at least one."""
    return max(1, math.ceil(epochs * steps_per_epoch))


def job_from_config(
    config: Config,
    section: Literal["pretrain", "teacher", "student"],
    folder: str,
    streams: tuple[StreamSpec, ...],
    num_classes: int,
    validation: Split | None,
    initial: InitialWeights | None = None,
) -> TrainJob:
    """The training that a section of the configuration describes."""
    return TrainJob(
        name=section,
        folder=folder,
        config=config.training(section),
        streams=streams,
        num_classes=num_classes,
        num_labeled=streams[0].num_images,
        seed=config.seed,
        threads=config.threads,
        device=config.resolved_device(),
        validation=validation,
        initial=initial,
    )
