"""Estimate the time of a plan's stages: on this machine by a short measurement, on GPUs from published figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from data.errors import DataError
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import Split
from pipeline.core.devices import UNKNOWN_DEVICE, is_elsewhere
from pipeline.core.schema import Config, TrainConfig
from pipeline.core.timing import duration
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta

GPUS = (1, 8, 64)
_REFERENCE = ("resnetrs152", 256)
# images/s of that model: timm's published figures, mixed precision; training on an RTX 3090, inference on an RTX 4090
_GPU_TRAINS, _GPU_LABELS = 282.0, 2029.0
_STAND_IN = ("resnetrs50", 160)  # timed in place of models that are too large to time in a moment
_MAX_FLOPS = {"cpu": 2e10, "cuda": 2e12}  # per image, of a model that is timed itself
_BATCH_FLOPS = {"cpu": 2e10, "cuda": 2e12}  # per timed batch
_MEASURE_S, _DAY_S = 0.6, 86_400
_DECODED = 32  # images, to time decoding on one core


@dataclass(frozen=True)
class Workload:
    """A number of images through a model.

    Attributes:
        images: over all epochs, views and teachers.
        trains: forward and backward passes; False: forward alone.
        section: model and image size.
    """

    name: str
    images: int
    trains: bool
    section: TrainConfig
    num_classes: int


def print_estimate(config: Config, workloads: Sequence[Workload], unlabeled: Split | None) -> None:
    """Print a table of times, and what they assume."""
    device = _device_here(config)
    here = "this GPU" if device == "cuda" else f"{config.threads} threads here"
    rows = [["", here, *map(_gpus, GPUS)]]
    for work in workloads:
        seconds = [work.images / speed for speed in (_measured(work, config), *(n * _on_gpu(work) for n in GPUS))]
        rows.append([work.name, *(_format_time(value) for value in seconds)])
    print("\ntime of the models, if they never wait for images:")
    print_table(rows)
    print("\n".join(f"  {line}" for line in _assumptions(config, workloads, unlabeled)))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows with as many cells each, aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _assumptions(config: Config, workloads: Sequence[Workload], unlabeled: Split | None) -> list[str]:
    model, size = _REFERENCE
    most = _MAX_FLOPS[_device_here(config)] / 1e9
    lines = [
        f"here: timed now, for a second or two; models above {most:,.0f} B FLOPs per image are scaled by FLOPs from a smaller one",
        f"GPUs: by FLOPs from timm's published {_GPU_TRAINS:,.0f} images/s of training (RTX 3090) and {_GPU_LABELS:,.0f} of inference",
        f"      (RTX 4090) of {model} at {size} px, mixed precision; a GPU twice as fast takes half the time",
    ]
    decoded = _decoded_per_s(config, unlabeled)
    if decoded is None:
        return [*lines, "decoding: not timed, because no image of the unlabeled shards could be read"]
    labeling = next((work for work in workloads if not work.trains), None)
    need = [f"{number * _on_gpu(labeling) / decoded:,.0f}" for number in GPUS] if labeling else []
    feed = f"; to keep labeling fed on {', '.join(map(str, GPUS))} GPUs: {', '.join(need)} cores" if need else ""
    return [*lines, f"decoding: {decoded:,.0f} images/s per core (on the first unlabeled shard){feed}"]


def _device_here(config: Config) -> str:
    """The run's device, or the CPU where only other machines have that, or nobody says."""
    device = config.known_device()
    return "cpu" if device == UNKNOWN_DEVICE or is_elsewhere(device) else device


def _format_time(seconds: float) -> str:
    if seconds < 2 * _DAY_S:
        return duration(seconds)
    return f"{seconds / _DAY_S:,.1f} days" if seconds < 1000 * _DAY_S else f"{seconds / 365 / _DAY_S:,.0f} years"


def _on_gpu(work: Workload) -> float:
    """Estimated images per second of one GPU."""
    model, size = _REFERENCE
    speed = _GPU_TRAINS if work.trains else _GPU_LABELS
    return speed * _size(model, "{}", size, 1000)[1] / size_of(work.section, work.num_classes)[1]


def _measured(work: Workload, config: Config) -> float:
    """Images per second on this machine, measured, or scaled from the stand-in."""
    device = _device_here(config)
    flops = size_of(work.section, work.num_classes)[1]
    if flops <= _MAX_FLOPS[device]:
        return _timed(work.section, work.num_classes, flops, work.trains, device, config.threads)
    model, size = _STAND_IN
    stand_in = TrainConfig(model=model, image_size=size)
    of_stand_in = _size(model, "{}", size, 1000)[1]
    return _timed(stand_in, 1000, of_stand_in, work.trains, device, config.threads) * of_stand_in / flops


def size_of(section: TrainConfig, num_classes: int) -> tuple[int, int]:
    """The number of parameters of a model, and its FLOPs per image."""
    return _size(section.model, json.dumps(section.model_args, sort_keys=True), section.image_size, num_classes)


@cache
def _size(model: str, model_args: str, image_size: int, num_classes: int) -> tuple[int, int]:
    built = on_meta(lambda: build_model(model, num_classes, json.loads(model_args)))
    return count_parameters(built), count_flops(built, image_size)


def _timed(section: TrainConfig, num_classes: int, flops: int, trains: bool, device: str, threads: int) -> float:
    """Measure a model's images per second on images of zeros."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    batch = int(max(1, min(section.batch_size, _BATCH_FLOPS[device] // flops)))
    model = build_model(section.model, num_classes, section.model_args).to(device).train(trains)
    images = torch.zeros(max(batch, 2), 3, section.image_size, section.image_size, device=device)

    def run() -> None:
        with (
            torch.set_grad_enabled(trains),
            torch.autocast(device, torch.bfloat16, enabled=section.precision == "bf16"),
        ):
            outputs = model(images)
            if trains:
                outputs.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        return len(images) * _per_second(run)
    finally:
        torch.set_num_threads(before)


def _per_second(run: Callable[[], object]) -> float:
    """Measure calls per second, after a warm-up call."""
    run()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < _MEASURE_S:
        run()
        calls += 1
    return calls / (time.perf_counter() - started)


def _decoded_per_s(config: Config, unlabeled: Split | None) -> float | None:
    """Measure the images per second that one core reads, decodes and resizes for labeling; None when none can be read."""
    if unlabeled is None:
        return None
    shard = unlabeled.shards[0]
    view = Preprocessing.of_training(config.teacher).view(config.label.decoder)
    try:
        places = [place for place in places_in(shard.index().slice(0, _DECODED)) if place.size]
        with ImageReader([shard.url]) as reader:
            contents = reader.images(0, places)
        return len(contents) * _per_second(lambda: [view(content) for content in contents]) if contents else None
    except (OSError, DataError, DecodeError):
        return None
