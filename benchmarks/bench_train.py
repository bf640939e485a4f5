"""Steps per second of `fit()` beside timm's training script, on the same model, batch, shards and augmentation.

    python -m benchmarks.bench_train [rounds=3] [steps=30] [only=ours,ray_train]

ResNet-RS-50 of width 0.25 on JPEG photos of 500 × 375, cropped to 64 px, RandAugment (2 operations, magnitude 15, always), batches
of 64, fp32, channels_last; one thread trains and one process loads. Contenders take turns; medians over rounds. The first five
steps are not counted: start-up, first batches, Ray's start.

    ours            fit()
    timm            timm's loop (benchmarks/timm_loop.py)
    synthetic       fit() on one batch in memory: the model's own speed
    ray_train       fit() in a TorchTrainer of one worker
    ours, loading   fit() of a nearly free model, and
    timm, loading   timm's loop with it: the speed of the input in training
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks import timm_loop
from benchmarks.photos import PHOTOS, make_photos
from benchmarks.trainings import fit_rate, on_one_batch
from data.settings import UsageError, run_command
from data.shards.split import Split, open_split
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import TrainConfig
from pipeline.models.registry import build_model
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit

WARM_UP, NUM_SHARDS, PER_SHARD = 5, 4, 128
CONFIG = TrainConfig(
    model="resnetrs50", model_args={"width": 0.25}, image_size=64, batch_size=64, dropout=0.0, channels_last=True,
    loader_workers=1, log_every_steps=WARM_UP, warmup_epochs=0, checkpoint_every_s=1e6,
)  # fmt: skip
TINY = CONFIG.model_copy(update={"model": "resnetrs26", "model_args": {"width": 0.125, "blocks": [1, 1, 1, 1]}})


def bench(rounds: int = 3, steps: int = 30, only: str = "", out: str = "runs/bench_train") -> None:
    """Run all contenders, or those in `only`, in turn and print their rates."""
    torch.set_num_threads(1)
    split = open_split(make_photos(f"{out}/photos", NUM_SHARDS, PER_SHARD, labeled=True), "/nonexistent")
    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: fit_rate(split, CONFIG, steps, WARM_UP, len(PHOTOS)),
        "timm": lambda: timm(split, CONFIG, steps),
        "synthetic": lambda: on_one_batch(split, CONFIG, steps, WARM_UP, len(PHOTOS)),
        "ray_train": lambda: ray_train(split, steps),
        "ours, loading": lambda: fit_rate(split, TINY, steps, WARM_UP, len(PHOTOS)),
        "timm, loading": lambda: timm(split, TINY, steps),
    }
    wanted = only.split(",") if only else list(contenders)
    if not set(wanted) <= set(contenders):
        raise UsageError(f"only={only}: expected some of {', '.join(contenders)}")
    found: dict[str, list[float]] = {name: [] for name in wanted}
    for number in range(rounds):
        for name in wanted:
            found[name].append(contenders[name]())
            print(f"round {number + 1}  {name:14} {found[name][-1]:7.3f} steps/s", flush=True)
    _print_rates(found)
    if not only:
        _print_results(found)


def timm(split: Split, config: TrainConfig, steps: int) -> float:
    """Run timm's loop on the same model."""
    model = build_model(config.model, len(PHOTOS), config.model_args).to(memory_format=torch.channels_last)
    return timm_loop.train(model, timm_loop.make_loader(split, config), config, steps, WARM_UP)


def ray_train(split: Split, steps: int) -> float:
    """Train in a worker of Ray Train."""
    start_ray(None)
    try:
        return fit_rate(split, CONFIG, steps, WARM_UP, len(PHOTOS), run=in_ray_train)
    finally:
        ray.shutdown()  # timm forks its loader processes, which would break Ray's connection


def in_ray_train(job: TrainJob, run: Callable[[TrainJob], None] = fit) -> None:
    """Run `fit()` or another function in one worker of Ray Train."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    TorchTrainer(
        lambda: run(job),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="bench", storage_path=str(Path(job.folder).resolve() / "ray")),
    ).fit()


def _print_rates(found: dict[str, list[float]]) -> None:
    print(f"\nmedians of {len(next(iter(found.values())))} rounds, steps of {CONFIG.batch_size} images per second:")
    for name, rates in found.items():
        of_ours = median(rate / ours for rate, ours in zip(rates, found.get("ours", rates), strict=True))
        print(
            f"  {name:14} {median(rates):7.3f}   ({min(rates):.3f} to {max(rates):.3f}); {of_ours:.1%} of ours, median of the rounds"
        )


def _print_results(found: dict[str, list[float]]) -> None:
    rates = {name: median(rates) for name, rates in found.items()}
    of_timm = median(a / b for a, b in zip(found["ours"], found["timm"], strict=True))
    of_model = median(a / b for a, b in zip(found["ours"], found["synthetic"], strict=True))
    overhead = median(1 - b / a for a, b in zip(found["ours"], found["ray_train"], strict=True))
    print(
        f"ours: {of_timm:.2f} times timm, {of_model:.1%} of the model's own speed; Ray Train costs {overhead:.1%} "
        "(medians of the rounds' ratios)"
    )
    record = {
        "bench": "train", "unit": "steps/s up", "ours": round(rates["ours"], 3), "floor": round(rates["synthetic"], 3),
        "peers": {"timm": round(rates["timm"], 3)}, "ray_train": round(rates["ray_train"], 3), "ray_overhead": round(overhead, 4),
        "of_timm": round(of_timm, 3), "of_synthetic": round(of_model, 3),
        "loading": {"ours": round(rates["ours, loading"], 3), "timm": round(rates["timm, loading"], 3)},
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "seeds": 1,
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
