"""Measure a model's latency for one image and its images per second. Clocks are never part of a committed output."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch

from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_weights import load_predictor

_MIN_SECONDS = 0.5
_MIN_MEASUREMENTS = 5
_MAX_BATCH_SIZE = 64  # fewer images when the batch would take longer than a second


def measure_speed(folders: Mapping[str, str], device: str, threads: int, max_batch_size: int) -> dict[str, Any]:
    """Per role, median `latency_ms` of one image and `images_per_s` in batches of `batch_size`, from pixels to logits.

    Batch norms are folded, as for labeling. Takes a second or two per model.

    Args:
        max_batch_size: images that fit into memory; at most 64 are used.
    """
    torch.set_num_threads(threads)
    found = {
        role: _measure(load_predictor(folder, device, 1, fast=True), max_batch_size) for role, folder in folders.items()
    }
    where = "GPU" if device == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {"where": where, "models": found}


def _measure(predictor: Predictor, max_batch_size: int) -> dict[str, float]:
    latency_s = _seconds(predictor, 1)
    images = max(1, min(_MAX_BATCH_SIZE, max_batch_size, int(1 / latency_s)))
    batch_s = _seconds(predictor, images)
    return {
        "latency_ms": round(1000 * latency_s, 3),
        "images_per_s": round(images / batch_s, 1),
        "batch_size": images,
    }


def _seconds(predictor: Predictor, batch_size: int) -> float:
    """Median seconds of a batch after a warm-up. `logits` returns CPU values, which waits for a GPU."""
    predictor.batch_size = batch_size
    size = predictor.preprocessing.image_size
    images = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8)
    predictor.logits(images)
    taken: list[float] = []
    while len(taken) < _MIN_MEASUREMENTS or sum(taken) < _MIN_SECONDS:
        started = time.perf_counter()
        predictor.logits(images)
        taken.append(time.perf_counter() - started)
    return median(taken)
