"""FixMatch, the alternative, beside this project's student: same model, images and compute, on Fashion-MNIST.

    python -m benchmarks.bench_fixmatch [seeds=0,1,2] [split=test|development] [lr=0.03] [ema_decay=0.999] [out=runs/bench_fixmatch]

Both use 500 labeled and 54,000 unlabeled images, and train the student's network of `config=fashion_mnist`. FixMatch is as
published: weak views (flip, shift), strong ones (this project's RandAugment and cut-out), threshold 0.95, 7 unlabeled images per
labeled one, weight 1, EMA, Nesterov momentum, cosine 7πk/16K. Its number of steps follows from the compute of teacher, labels and
student, counted in training passes of an image through the student's network: a forward pass is a third of one, and the
teacher's network counts by its FLOPs. The project's teacher and student are the runs of benchmarks.bench_accuracy, made if
missing. Choose `lr` and `ema_decay` with split=development; report with split=test. The same command continues.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch

from benchmarks import bench_accuracy
from benchmarks.fixmatch import FixMatch, read_images, train
from data import fashion_mnist
from data.settings import UsageError, run_command
from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.core.schema import Config, TrainConfig
from pipeline.inference.accuracy import top_k_accuracy
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.registry import build_model, count_flops

FORWARD = 1 / 3  # of a training pass: backward is about two forward passes
NUM_CLASSES = 10
LABELS_PER_CLASS = 50


def bench(
    seeds: str = "0,1,2",
    split: str = "test",
    lr: float = 0.03,
    ema_decay: float = 0.999,
    out: str = "runs/bench_fixmatch",
) -> None:
    """Train what is missing and print accuracies side by side; see the module docstring."""
    if split not in ("development", "test"):
        raise UsageError(f"split={split}: expected development or test")
    found: dict[str, list[float]] = {"teacher": [], "student": [], "fixmatch": []}
    for seed in map(int, seeds.split(",")):
        data = f"datasets/fashion_mnist-{LABELS_PER_CLASS}-{seed}"
        fashion_mnist.prepare(data, LABELS_PER_CLASS, seed)
        for role in ("teacher", "student"):
            found[role].append(_ours(role, data, seed, split))
        found["fixmatch"].append(_fixmatch(data, seed, split, FixMatch(0, lr=lr, ema_decay=ema_decay), out))
        print(f"seed {seed}: " + "  ".join(f"{name} {values[-1]:.2%}" for name, values in found.items()), flush=True)
    print(f"\ntop-1 on the {split} images, {len(found['student'])} seeds (mean ± standard deviation):")
    for name, values in found.items():
        print(f"  {name:10} {mean(values):7.2%}" + (f" ± {stdev(values):.2%}" if len(values) > 1 else ""))
    record = {
        "bench": "fixmatch", "unit": "top-1 up", "ours": mean(found["student"]), "peers": {"fixmatch": mean(found["fixmatch"])},
        "floor": mean(found["teacher"]), "memory_mb": None, "seeds": len(found["student"]), "split": split,
    }  # fmt: skip
    print(json.dumps(record))


def _ours(role: str, data: str, seed: int, split: str) -> float:
    folder = bench_accuracy.arm_folder(role, data, Path(f"runs/bench_accuracy/{LABELS_PER_CLASS}-{seed}"), seed, [])
    return bench_accuracy.accuracy(folder, f"{data}/{split}/*.tar", data)


def _fixmatch(data: str, seed: int, split: str, method: FixMatch, out: str) -> float:
    """Return FixMatch's top-1; train and measure it if needed."""
    config = load_config("fashion_mnist", [])
    splits = {name: open_split(f"{data}/{name}/*.tar", f"{data}/index") for name in ("labeled", "unlabeled", split)}
    num_labeled, num_unlabeled = splits["labeled"].num_samples, splits["unlabeled"].num_samples
    ours = our_passes(config, num_labeled, num_unlabeled)
    method = replace(method, steps=round(sum(ours.values()) / passes_per_step(method)))
    folder = Path(out) / f"{seed}-lr{method.lr:g}-ema{method.ema_decay:g}-{method.steps}"
    result = folder / f"{split}.json"
    if not result.exists():
        counted = " + ".join(f"{name} {passes:,.0f}" for name, passes in ours.items())
        each = f"{method.steps:,} steps of {passes_per_step(method):,.0f}"
        print(f"compute, in training passes of the student's network: {counted}; FixMatch {each}", flush=True)
        torch.set_num_threads(1)
        labeled, unlabeled = (read_images(splits[name]) for name in ("labeled", "unlabeled"))
        network = train(labeled, unlabeled, config.student, method, NUM_CLASSES, seed, str(folder / "checkpoints"))
        preprocessing = Preprocessing.of_training(config.student)
        predictor = Predictor(network, preprocessing, "cpu", channels_last=config.student.channels_last)
        logits, labels = predict_split(splits[split], predictor)
        result.write_text(json.dumps({"top1": top_k_accuracy(logits, labels)[0], "steps": method.steps}))
    return float(json.loads(result.read_text())["top1"])


def our_passes(config: Config, num_labeled: int, num_unlabeled: int) -> dict[str, float]:
    """Return the training passes of teacher, labels and student, in passes of an image through the student's network."""
    relative = _flops(config.teacher) / _flops(config.student)
    share = config.student.batch_size // (1 + config.student.unlabeled_ratio)
    return {
        "teacher": config.teacher.epochs * num_labeled * relative,
        "labels": num_unlabeled * config.label.views * FORWARD * relative,
        "student": config.student.epochs * num_labeled / share * config.student.batch_size,
    }


def passes_per_step(method: FixMatch) -> float:
    """Return FixMatch's passes per step: labeled and strong views train, weak ones only go forward."""
    return method.batch_size * (1 + method.ratio + method.ratio * FORWARD)


def _flops(section: TrainConfig) -> int:
    return count_flops(build_model(section.model, NUM_CLASSES, section.model_args), section.image_size)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
