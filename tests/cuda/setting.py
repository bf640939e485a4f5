"""Small real images and a short training for the tests of a GPU, which share nothing with the others: a bare machine runs them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.shards.split import Split, open_split
from data.shards.write import Fields, labeled_members, write_shards
from pipeline.core.schema import TrainConfig
from pipeline.inputs.streams import labeled_stream
from pipeline.training.job import TrainJob

NUM_CLASSES, SIDE, NUM_IMAGES = 4, 32, 64
MODEL = {"model": "resnetrs26", "model_args": {"width": 0.25, "blocks": [1, 1, 1, 1]}, "image_size": SIDE}

_HAS_GPU = torch.cuda.is_available()
_ON_CUDA = pytest.param(
    "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not _HAS_GPU, reason="torch finds no GPU here")]
)
on_each_device = pytest.mark.parametrize("device", ["cpu", _ON_CUDA])
only_on_cuda = pytest.mark.parametrize("device", [_ON_CUDA])


def write_colours(folder: Path) -> Split:
    """64 images of one of four colours with noise, in two shards."""
    generator = np.random.default_rng(0)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [180, 180, 40]])

    def sample(number: int) -> tuple[str, Fields]:
        label = number % NUM_CLASSES
        pixels = np.clip(colours[label] + generator.normal(0, 25, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        return f"{number:04d}", labeled_members("jpg", buffer.getvalue(), label)

    names = [f"colour {number}" for number in range(NUM_CLASSES)]
    write_shards(map(sample, range(NUM_IMAGES)), str(folder / "shards"), "colours", NUM_IMAGES // 2, names)
    return open_split(str(folder / "shards/*.tar"), str(folder / "index"))


def config_for(device: str, **fields: Any) -> TrainConfig:
    """A short training: on a GPU in bf16."""
    return TrainConfig.model_validate({
        **MODEL, "batch_size": 16, "epochs": 10, "warmup_epochs": 0, "lr": 0.4, "dropout": 0.0, "bn_momentum": 0.1, "ema_decay": 0.9,
        "label_smoothing": 0.0, "precision": "bf16" if device == "cuda" else "fp32", "log_every_steps": 5, "loader_workers": 0,
        "channels_last": True, "augment": {"num_ops": 1, "magnitude": 3, "hflip": 0.5},
    } | fields)  # fmt: skip


def job_for(split: Split, config: TrainConfig, device: str, folder: Path) -> TrainJob:
    """A training on all images, which are the validation images, too."""
    return TrainJob(
        name="teacher",
        folder=str(folder),
        config=config,
        streams=(labeled_stream(split, config.batch_size),),
        num_classes=NUM_CLASSES,
        num_labeled=split.num_samples,
        seed=0,
        threads=1,
        device=device,
        validation=split,
    )


def metrics_of(job: TrainJob) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(job.folder) / "metrics.jsonl").read_text().splitlines()]
