"""What pseudo-labels gain on Fashion-MNIST: teacher, student, and the student without them, over several seeds.

    python -m benchmarks.bench_accuracy [labels_per_class=50] [seeds=0,1,2] [arms=all|teacher,student] [split=test|development]
        [words="teacher.lr=0.1 …" out=DIR]

A seed determines the labeled images and all randomness in training. Choose recipes with split=development, report with
split=test; `words` changes the recipe of teacher and student. Each arm is a run directory, so the same command continues.

    teacher         trained on the labels
    student         trained on labels and pseudo-labels, noised
    labels_alone    the student's model and noise, trained on the labels
    without_noise   the student without input and model noise
    all_labels      the student's model and noise, trained on true labels of all images
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow.parquet as pq
import torch

from data import fashion_mnist
from data.settings import UsageError, run_command
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from data.shards.write import Fields, labeled_members, write_shards
from pipeline.core.config import load_config
from pipeline.core.schema import TrainConfig
from pipeline.inference.accuracy import top_k_accuracy
from pipeline.inference.predictor import predict_split
from pipeline.inference.stage_weights import load_predictor
from pipeline.run import main as pipeline

ARMS = ("teacher", "student", "labels_alone", "without_noise", "all_labels")
NO_NOISE = [
    "student.dropout=0", "student.stochastic_depth=0", "student.mixup=0", "student.augment.cutout=0", "student.augment.num_ops=0",
    "student.augment.hflip=0", "student.augment.rotation=0", "student.augment.zoom=0", "student.augment.brightness=0",
]  # fmt: skip
PER_SHARD = 6000


class BenchmarkError(ValueError):
    """A run failed; the message gives its command."""


def bench(
    labels_per_class: int = 50,
    seeds: str = "0,1,2",
    arms: str = "all",
    split: str = "test",
    words: str = "",
    out: str = "runs/bench_accuracy",
) -> None:
    """Run all arms of all seeds and print their accuracies; see the module docstring."""
    if split not in ("development", "test"):
        raise UsageError(f"split={split}: expected development or test")
    wanted = ARMS if arms == "all" else tuple(arms.split(","))
    if not set(wanted) <= set(ARMS):
        raise UsageError(f"arms={arms}: expected all, or some of {', '.join(ARMS)}")
    started = time.monotonic()
    rows = []
    for seed in map(int, seeds.split(",")):
        data = f"datasets/fashion_mnist-{labels_per_class}-{seed}"
        fashion_mnist.prepare(data, labels_per_class, seed)
        folder = Path(out) / f"{labels_per_class}-{seed}"
        folders = {arm: arm_folder(arm, data, folder, seed, words.split()) for arm in wanted}
        rows.append({arm: accuracy(folder, f"{data}/{split}/*.tar", data) for arm, folder in folders.items()})
        print(f"seed {seed}: " + "  ".join(f"{arm} {value:.2%}" for arm, value in rows[-1].items()), flush=True)
    _print_results(rows, labels_per_class, split, time.monotonic() - started)


def arm_folder(arm: str, data: str, out: Path, seed: int, recipe: Sequence[str]) -> str:
    """Return the folder of an arm's weights; train it if needed."""
    run = f"{out}/run"
    if arm == "teacher":
        run_stages("stage=teacher", run, data, seed, *recipe)
        return f"{run}/gen-1/teacher"
    if arm == "student":
        run_stages("stage=teacher,label,select,student", run, data, seed, *recipe)
        return f"{run}/gen-1/student"
    if arm == "without_noise":
        for part in ("teacher", "labels", "selections"):
            if not (out / arm / "gen-1" / part).exists():
                shutil.copytree(Path(run) / "gen-1" / part, out / arm / "gen-1" / part)
        run_stages("stage=student", f"{out}/{arm}", data, seed, *NO_NOISE)
        return f"{out}/{arm}/gen-1/student"
    words = _student_as_teacher()
    if arm == "all_labels":
        pack_truth(data)
        words += _all_labels_words(data)
    run_stages("stage=teacher", f"{out}/{arm}", data, seed, *words)
    return f"{out}/{arm}/gen-1/teacher"


def _all_labels_words(data: str) -> list[str]:
    """Return overrides: the student's steps and batch size, all images with true labels."""
    student = load_config("fashion_mnist", []).student
    num_labeled = open_split(f"{data}/labeled/*.tar", f"{data}/index").num_samples
    steps = student.epochs * num_labeled / (student.batch_size // (1 + student.unlabeled_ratio))
    images = open_split(f"{data}/truth/*.tar", f"{data}/index").num_samples
    epochs = steps * student.batch_size / images
    return [
        f"teacher.batch_size={student.batch_size}", f"teacher.epochs={epochs:.4f}",
        f"teacher.warmup_epochs={epochs * student.warmup_epochs / student.epochs:.4f}", "teacher.eval_every_epochs=1",
        f"data.labeled=[{data}/truth/*.tar]",
    ]  # fmt: skip


def _student_as_teacher() -> list[str]:
    """Return overrides that give the teacher the student's model, noise and schedule: as many steps, on labeled images only."""
    student = load_config("fashion_mnist", []).student
    shared = TrainConfig.model_fields.keys() - {"augment", "batch_size", "init"}
    words = [f"teacher.{name}={_word(value)}" for name, value in student if name in shared]
    words += [f"teacher.augment.{name}={_word(value)}" for name, value in student.augment]
    return [*words, f"teacher.batch_size={student.batch_size // (1 + student.unlabeled_ratio)}"]


def _word(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace('"', "")


def run_stages(stage: str, run_dir: str, data: str, seed: int, *words: str) -> None:
    """Run stages of the demo on a seed's data. Raises BenchmarkError when they fail."""
    patterns = [f"data.{name}=[{data}/{name}/*.tar]" for name in ("labeled", "validation", "unlabeled", "test")]
    hashes = f"data.held_out_hashes=[{data}/validation/hashes.parquet,{data}/test/hashes.parquet]"
    command = [stage, "config=fashion_mnist", f"run_dir={run_dir}", f"seed={seed}", *patterns, hashes]
    command += [f"data.truth={data}/truth.parquet", *words]
    if pipeline(command) != 0:
        raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")


def pack_truth(data: str) -> None:
    """Write shards of all labeled and unlabeled images, with true labels."""
    folder = Path(data) / "truth"
    if (folder / "manifest.json").exists():
        return
    truth = {
        (shard, ordinal): label
        for shard, ordinal, label in zip(*pq.read_table(f"{data}/truth.parquet").to_pydict().values(), strict=True)
    }

    def samples() -> Iterator[tuple[str, Fields]]:
        number = 0
        for name in ("labeled", "unlabeled"):
            split = open_split(f"{data}/{name}/*.tar", f"{data}/index")
            with ImageReader([shard.url for shard in split.shards]) as reader:
                for position, shard in enumerate(split.shards):
                    for ordinal, row in enumerate(shard.index().to_pylist()):
                        label = truth[shard.name, ordinal] if row["label"] is None else row["label"]
                        yield (
                            f"{number:06d}",
                            labeled_members("png", reader.read(position, row["offset"], row["size"]), label),
                        )
                        number += 1

    write_shards(samples(), str(folder), "truth", PER_SHARD, fashion_mnist.CLASS_NAMES)


def accuracy(folder: str, shards: str, data: str) -> float:
    """Top-1, in 0 to 1, of a stage's weights on labeled shards."""
    torch.set_num_threads(2)
    logits, labels = predict_split(open_split(shards, f"{data}/index"), load_predictor(folder, "cpu"))
    return top_k_accuracy(np.asarray(logits), labels)[0]


def _print_results(rows: Sequence[dict[str, float]], labels_per_class: int, split: str, seconds: float) -> None:
    print(
        f"\n{labels_per_class} labels a class, top-1 on the {split} images, {len(rows)} seeds (mean ± standard deviation):"
    )
    means = {arm: mean(row[arm] for row in rows) for arm in rows[0]}
    for arm, value in means.items():
        spread = stdev(row[arm] for row in rows) if len(rows) > 1 else 0.0
        print(f"  {arm:14} {value:7.2%} ± {spread:.2%}")
    if {"teacher", "student"} <= means.keys():
        gain = means["student"] - means["teacher"]
        way = (
            f", {gain / (means['all_labels'] - means['teacher']):.0%} of the way to all labels"
            if "all_labels" in means
            else ""
        )
        print(f"the student is {gain * 100:+.2f} points from its teacher{way} ({seconds:.0f} s)")
    record = {
        "bench": "accuracy", "unit": "top-1 up", "ours": means.get("student"),
        "peers": {arm: value for arm, value in means.items() if arm not in ("student", "teacher")},
        "floor": means.get("teacher"), "memory_mb": None, "seeds": len(rows), "split": split, "labels_per_class": labels_per_class,
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
