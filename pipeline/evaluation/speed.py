"""Measure a model's latency for one image and its images per second. Clocks are never part of a committed output."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_weights import load_predictor

_ROUNDS = 5
_MIN_SECONDS = 0.1  # of a round's measurement
_MAX_BATCH_SIZE = 64  # fewer images when the batch would take longer than a second
_MAX_SPREAD = 0.25  # (slowest − fastest) ÷ median of the rounds, above which something else is at work
_MIN_SHARE = 0.9  # of the time on a core, below which something else is, too


def measure_speed(folders: Mapping[str, str], device: str, threads: int, max_batch_size: int) -> dict[str, Any]:
    """Per role, median `latency_ms` of one image and `images_per_s` in batches of `batch_size`, from pixels to logits.

    Each is measured in five rounds, all models in each round, so that a busy moment slows all of them. `spread` of a model: (slowest −
    fastest) ÷ median of its rounds, in batches. `busy`: a spread is above 0.25, or, on a CPU, this thread had a core for less than
    90 % of the time. (The machine's load says less: the stages before leave it high for minutes.)
    Batch norms are folded, as for labeling. Takes a second or two per model.

    Args:
        max_batch_size: images that fit into memory; at most 64 are used.
    """
    torch.set_num_threads(threads)
    predictors = {role: load_predictor(folder, device, 1, fast=True) for role, folder in folders.items()}
    started, worked = time.perf_counter(), time.thread_time()
    found = _measure(predictors, max_batch_size)
    share = (time.thread_time() - worked) / (time.perf_counter() - started)
    waited = device != "cuda" and share < _MIN_SHARE
    busy = waited or any(figures["spread"] > _MAX_SPREAD for figures in found.values())
    where = "GPU" if device == "cuda" else f"CPU, {threads} thread{'s' * (threads > 1)}"
    return {"where": where, "busy": busy, "models": found}


def _measure(predictors: Mapping[str, Predictor], max_batch_size: int) -> dict[str, dict[str, float]]:
    sizes = {role: _batch_size(predictor, max_batch_size) for role, predictor in predictors.items()}
    rounds: dict[str, list[tuple[float, float]]] = {role: [] for role in predictors}
    for _ in range(_ROUNDS):
        for role, predictor in predictors.items():
            rounds[role].append((_seconds(predictor, 1), _seconds(predictor, sizes[role])))
    return {role: _figures(sizes[role], *zip(*rounds[role], strict=True)) for role in predictors}


def _batch_size(predictor: Predictor, max_batch_size: int) -> int:
    return max(1, min(_MAX_BATCH_SIZE, max_batch_size, int(1 / _seconds(predictor, 1))))


def _figures(batch_size: int, alone_s: Sequence[float], batch_s: Sequence[float]) -> dict[str, float]:
    return {
        "latency_ms": round(1000 * median(alone_s), 3),
        "images_per_s": round(batch_size / median(batch_s), 1),
        "batch_size": batch_size,
        "spread": round((max(batch_s) - min(batch_s)) / median(batch_s), 3),
    }


def _seconds(predictor: Predictor, batch_size: int) -> float:
    """Median seconds of a batch after a warm-up. `logits` returns CPU values, which waits for a GPU."""
    predictor.batch_size = batch_size
    images = torch.zeros(batch_size, *predictor.preprocessing.view_shape, dtype=torch.uint8)
    predictor.logits(images)
    taken: list[float] = []
    while sum(taken) < _MIN_SECONDS:
        started = time.perf_counter()
        predictor.logits(images)
        taken.append(time.perf_counter() - started)
    return median(taken)
