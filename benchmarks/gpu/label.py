"""Labeling throughput of one process: the host path, the device path, and `ShardLabeler`, which has both."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.setting import NUM_CLASSES, Model, Setting
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from teacher.labeling.label_shard import ShardLabeler

Result = dict[str, float]


def cells(setting: Setting) -> dict[str, Callable[[], Result]]:
    """Name → measurement."""
    return {f"label {model.title}": lambda model=model: measure(setting, model) for model in setting.models}  # type: ignore[misc]


def measure(setting: Setting, model: Model) -> Result:
    """Images per second of each path, and the peak memory of the GPU in GB."""
    predictor = setting.predictor(model)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    pixels = np.random.default_rng(0).integers(
        0, 256, (model.label_batch, model.image_size, model.image_size, 3), np.uint8
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    found = {
        "model": _predicting(predictor, images.to(setting.device), setting.seconds),
        "device": _predicting(predictor, images, setting.seconds),
        "host": _labeling(_free(setting, model), setting),
        "together": _labeling(predictor, setting),
    }
    found["together_of_slower_path"] = found["together"] / min(found["device"], found["host"])
    if setting.device == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _predicting(predictor: Predictor, images: torch.Tensor, seconds: float) -> float:
    """Images per second of batches that are in memory."""
    for _ in range(2):
        predictor.probabilities(images)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        predictor.probabilities(images)
        count += len(images)
    return count / (time.perf_counter() - started)


class _Free(Predictor):
    """A model that costs the host nothing: no normalization either, which is the device's work."""

    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), NUM_CLASSES), 1 / NUM_CLASSES)


def _free(setting: Setting, model: Model) -> Predictor:
    view = Preprocessing.of_training(setting.config(model))
    return _Free(nn.Identity(), view, "cpu", model.label_batch, decoder="fast")


def _labeling(predictor: Predictor, setting: Setting) -> float:
    """Images per second from JPEGs to label files: all shards, after the first one as a warm-up."""
    labeler = ShardLabeler(predictor, NUM_CLASSES, 10, 2, setting.workers, "benchmark")
    first, *rest = setting.photos().shards
    with tempfile.TemporaryDirectory() as out:
        labeler.label(first, f"{out}/{first.name}.parquet")
        started = time.perf_counter()
        rows = sum(labeler.label(shard, f"{out}/{shard.name}.parquet").rows for shard in rest)
        return rows / (time.perf_counter() - started)
