"""How long models take for a number of images: here by timing them for a moment, on GPUs from published figures.

Nothing is trained. A model above `_MAX_FLOPS`, which would take too long to time, is scaled by its FLOPs from a smaller one; one that
would take over a month here, even at a processor's peak, is not timed at all.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from pipeline.core.schema import TrainConfig
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta

GPUS = (1, 8, 64)  # that plans tell the time of
REFERENCE = ("resnetrs152", 256)
# images/s of that model: timm's published figures, mixed precision; training on an RTX 3090, inference on an RTX 4090
GPU_TRAINS, GPU_LABELS = 282.0, 2029.0
GPU_STEP_S, GPU_BATCH_S = (
    0.02,
    0.005,
)  # assumed: at least this for a step or a forward pass, however small, to launch its kernels
MAX_FLOPS = {"cpu": 2e10, "cuda": 2e12}  # per image, of a model that is timed itself
LIMIT_S = 30 * 86_400.0
_STAND_IN = ("resnetrs50", 160)  # timed in place of models above MAX_FLOPS
_PEAK_FLOPS = (
    1e11  # a second, of one CPU thread: two AVX-512 units of 16 fused multiply-adds at 3 GHz, of which none does half
)
_TRAINING = 3  # forward passes that a training step counts as: itself, and two for its gradients
_BATCH_FLOPS = {"cpu": 2e10, "cuda": 2e12}  # per timed batch
_MEASURE_S = 0.3


@dataclass(frozen=True)
class Workload:
    """A number of images through a model.

    Attributes:
        name: of the stage or row that does it.
        images: over all epochs, views and teachers.
        batches: in which they come, on one GPU.
        trains: forward and backward passes; False: forward alone.
        section: model and image size.
        threads: of one process.
        processes: that share the images.
        loading_s: seconds that one core takes to read, decode and augment all images; 0: not counted.
        loaders: cores that do so beside the model; 0: the model waits for it.
    """

    name: str
    images: int
    batches: int
    trains: bool
    section: TrainConfig
    num_classes: int
    threads: int
    processes: int = 1
    loading_s: float = 0.0
    loaders: int = 1


def expected_seconds(work: Workload, device: str) -> float:
    """Seconds on this machine; infinite if over `LIMIT_S` for certain. Threads, processes and loaders share its cores."""
    least = work.images * size_of(work.section, work.num_classes)[1] * (_TRAINING if work.trains else 1)
    if device == "cpu" and least / (_PEAK_FLOPS * (os.cpu_count() or 1)) > LIMIT_S:
        return math.inf
    model_s = work.images / images_per_s(work, device)
    if not work.loaders:
        return model_s / work.processes + work.loading_s
    used = (model_s * work.threads if device == "cpu" else 0.0) + work.loading_s
    return max(model_s / work.processes, work.loading_s / work.loaders, used / (os.cpu_count() or 1))


def gpu_seconds(work: Workload, number: int) -> float:
    """Seconds on so many GPUs, if they never wait for images."""
    return work.images / gpu_images_per_s(work, number) if work.images else 0.0


def gpu_images_per_s(work: Workload, number: int) -> float:
    """Images per second of so many GPUs, by FLOPs from the published model. They share each step, but take whole batches of others."""
    model, size = REFERENCE
    speed = GPU_TRAINS if work.trains else GPU_LABELS
    by_flops = speed * _size(model, "{}", size, 1000)[1] / size_of(work.section, work.num_classes)[1]
    per_batch = work.images / work.batches
    return min(number * by_flops, per_batch / GPU_STEP_S if work.trains else number * per_batch / GPU_BATCH_S)


def images_per_s(work: Workload, device: str) -> float:
    """Images per second of one process on this machine, timed, or scaled from the stand-in."""
    flops = size_of(work.section, work.num_classes)[1]
    if flops <= MAX_FLOPS[device]:
        return _timed(work.section, work.num_classes, flops, work.trains, device, work.threads)
    model, size = _STAND_IN
    stand_in = TrainConfig(model=model, image_size=size)
    of_stand_in = _size(model, "{}", size, 1000)[1]
    return _timed(stand_in, 1000, of_stand_in, work.trains, device, work.threads) * of_stand_in / flops


def size_of(section: TrainConfig, num_classes: int) -> tuple[int, int]:
    """The number of parameters of a model, and its FLOPs per image."""
    return _size(section.model, _arguments(section), section.view_shape, num_classes)


def calls_per_s(call: Callable[[], object]) -> float:
    """Measure calls per second, after a warm-up call."""
    call()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < _MEASURE_S:
        call()
        calls += 1
    return calls / (time.perf_counter() - started)


def _arguments(section: TrainConfig) -> str:
    return json.dumps(section.model_args, sort_keys=True)


@cache
def _size(model: str, model_args: str, view_shape: int | tuple[int, ...], num_classes: int) -> tuple[int, int]:
    built = on_meta(lambda: build_model(model, num_classes, json.loads(model_args)))
    return count_parameters(built), count_flops(built, view_shape)


def _timed(section: TrainConfig, num_classes: int, flops: int, trains: bool, device: str, threads: int) -> float:
    """Measure a model's images per second on images of zeros; once for models that differ in nothing that takes time."""
    batch = max(2, int(min(section.batch_size, _BATCH_FLOPS[device] // flops)))
    shape = batch, *section.view_shape
    options = section.precision == "bf16", section.channels_last
    return _timed_model(section.model, _arguments(section), num_classes, shape, options, trains, device, threads)


@cache
def _timed_model(
    name: str, model_args: str, num_classes: int, shape: Sequence[int], options: tuple[bool, bool],
    trains: bool, device: str, threads: int,
) -> float:  # fmt: skip
    is_bf16, channels_last = options
    before, memory_format = torch.get_num_threads(), torch.channels_last if channels_last else torch.contiguous_format
    torch.set_num_threads(threads)
    model = build_model(name, num_classes, json.loads(model_args)).to(device).to(memory_format=memory_format)
    model.train(trains)
    images = torch.zeros(*shape, device=device).contiguous(memory_format=memory_format)

    def run() -> None:
        with torch.set_grad_enabled(trains), torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            outputs = model(images)
            if trains:
                outputs.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        return shape[0] * calls_per_s(run)
    finally:
        torch.set_num_threads(before)
