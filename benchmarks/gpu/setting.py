"""Sizes of the measurements: the models of the paper on a GPU, or a small form that any CPU runs in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.photos import make_photos
from data.settings import UsageError
from data.shards.split import Split, open_split
from pipeline.core.schema import TrainConfig
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.registry import build_model

NUM_CLASSES = 1000


@dataclass(frozen=True)
class Model:
    """A model, its image size, and the batch sizes of training and labeling."""

    name: str
    image_size: int
    train_batch: int
    label_batch: int
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For example `resnetrs50@160`."""
        return f"{self.name}@{self.image_size}"


@dataclass(frozen=True)
class Setting:
    """How much is measured, and where.

    Attributes:
        precision, compiles: of training and labeling.
        workers: processes that load, and threads that decode.
        steps, warm_up: of a training; the first `warm_up` steps are not timed.
        seconds: of each other measurement.
    """

    device: str
    models: tuple[Model, ...]
    precision: str
    compiles: bool
    workers: int
    num_shards: int
    per_shard: int
    steps: int
    warm_up: int
    seconds: float
    folder: str

    def photos(self) -> Split:
        """Labeled JPEG photos of 500 × 375 pixels; made once."""
        folder = f"{self.folder}/photos-{self.num_shards}x{self.per_shard}"
        return open_split(make_photos(folder, self.num_shards, self.per_shard, labeled=True), "/nonexistent")

    def config(self, model: Model) -> TrainConfig:
        """The training of a model: RandAugment as in the paper, mixed precision as configured."""
        return TrainConfig.model_validate({
            "model": model.name, "model_args": model.arguments, "image_size": model.image_size, "batch_size": model.train_batch,
            "precision": self.precision, "channels_last": True, "compile": self.compiles, "loader_workers": self.workers,
            "log_every_steps": self.warm_up, "warmup_epochs": 0, "checkpoint_every_s": 1e6,
            "augment": {"num_ops": 2, "magnitude": 15}, "stochastic_depth": 0.0, "dropout": 0.25,
        })  # fmt: skip

    def predictor(self, model: Model) -> Predictor:
        """A model with random weights as `stage=label` runs it: batch norms folded, channels_last."""
        built = fold_batch_norm(
            build_model(model.name, NUM_CLASSES, model.arguments), (3, model.image_size, model.image_size)
        )
        view = Preprocessing.of_training(self.config(model))
        return Predictor(built, view, self.device, model.label_batch, decoder="fast", channels_last=True)


def setting_of(device: str, small: bool, models: str, workers: int, folder: str) -> Setting:
    """The setting of a command line. Raises UsageError for a device that is not there, and for unknown models."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch finds no GPU here; small=true device=cpu shows that the benchmark runs")
    if small:
        tiny = Model("resnetrs26", 64, 8, 8, {"width": 0.125, "blocks": [1, 1, 1, 1]})
        return Setting(device, (tiny,), "fp32", False, 1, 2, 16, 4, 2, 0.2, folder)
    every = {"resnetrs50": Model("resnetrs50", 160, 256, 512), "resnetrs152": Model("resnetrs152", 224, 128, 256)}
    wanted = models.split(",")
    if not set(wanted) <= set(every):
        raise UsageError(f"models={models}: expected some of {', '.join(every)}")
    return Setting(device, tuple(every[name] for name in wanted), "bf16", True, workers, 8, 1024, 60, 20, 8.0, folder)
