"""What pseudo-labels buy on Fashion-MNIST: teacher, student, and what the student would be without them, over several seeds.

    python -m benchmarks.bench_accuracy [labels_per_class=50] [seeds=3] [out=runs/bench_accuracy] [split=development|test]

A seed chooses the labeled images and everything random in training. Recipes are chosen with split=development, and reported with
split=test. Every arm is a run directory of the pipeline, so the benchmark continues where it stopped.

    teacher         trained on the labels
    student         trained on labels and pseudo-labels, noised
    labels_alone    the student's model and noise, trained on the labels
    without_noise   the student without input and model noise
    all_labels      the student's model and noise, trained on the truth for all images
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
from data.manifest import open_split
from data.reader import ImageReader
from data.settings import UsageError, parse_settings
from data.shards import Members, labeled_members, write_shards
from pipeline.config import load_config
from pipeline.run import main as pipeline
from pipeline.training.inference import predict_split, top_k_accuracy
from pipeline.training.published import load_predictor

ARMS = ("teacher", "student", "labels_alone", "without_noise", "all_labels")
NO_NOISE = [
    "student.dropout=0", "student.stochastic_depth=0", "student.mixup=0", "student.augment.cutout=0",
    "student.augment.hflip=0", "student.augment.rotation=0", "student.augment.zoom=0", "student.augment.brightness=0",
]  # fmt: skip
PER_SHARD = 6000


class BenchmarkError(ValueError):
    """A run that failed; the message names its command."""


def bench(labels_per_class: int = 50, seeds: int = 3, out: str = "runs/bench_accuracy", split: str = "test") -> None:
    """Run all arms of all seeds and print their accuracies; see the module's text."""
    if split not in ("development", "test"):
        raise UsageError(f"split={split}: expected development or test")
    started = time.monotonic()
    rows = []
    for seed in range(seeds):
        data = f"datasets/fashion_mnist-{labels_per_class}-{seed}"
        fashion_mnist.prepare(data, labels_per_class, seed)
        folders = dict(_run_arms(data, Path(out) / f"{labels_per_class}-{seed}", seed))
        rows.append({arm: _accuracy(folder, f"{data}/{split}/*.tar", data) for arm, folder in folders.items()})
        print(f"seed {seed}: " + "  ".join(f"{arm} {value:.2%}" for arm, value in rows[-1].items()), flush=True)
    _print_results(rows, labels_per_class, split, time.monotonic() - started)


def _run_arms(data: str, out: Path, seed: int) -> Iterator[tuple[str, str]]:
    """(arm, folder with its weights), each trained if it is not yet."""
    run = str(out / "run")
    _pipeline("stage=teacher,label,select,student", run, data, seed)
    yield "teacher", f"{run}/gen-1/teacher"
    yield "student", f"{run}/gen-1/student"
    student_as_teacher = _student_as_teacher()
    _pipeline("stage=teacher", f"{out}/labels_alone", data, seed, *student_as_teacher)
    yield "labels_alone", f"{out}/labels_alone/gen-1/teacher"
    for part in ("teacher", "labels", "selections"):
        if not (out / "without_noise/gen-1" / part).exists():
            shutil.copytree(Path(run) / "gen-1" / part, out / "without_noise/gen-1" / part)
    _pipeline("stage=student", f"{out}/without_noise", data, seed, *NO_NOISE)
    yield "without_noise", f"{out}/without_noise/gen-1/student"
    _pack_truth(data)
    config = load_config("fashion_mnist", [])
    steps = config.student.epochs * 500 / (config.student.batch_size // (1 + config.student.unlabeled_ratio))
    epochs = f"teacher.epochs={steps * config.student.batch_size / 54_500:.4f}"
    _pipeline(
        "stage=teacher", f"{out}/all_labels", data, seed, *student_as_teacher, epochs, "teacher.warmup_epochs=0.2",
        "teacher.eval_every_epochs=1", f"data.labeled=[{data}/truth/*.tar]",
    )  # fmt: skip
    yield "all_labels", f"{out}/all_labels/gen-1/teacher"


def _student_as_teacher() -> list[str]:
    """The student's model, noise and schedule as overrides of the teacher, on labels alone: as many steps, of labels only."""
    student = load_config("fashion_mnist", []).student
    skipped = {"unlabeled_ratio", "pseudo_labels", "pseudo_label_temperature", "augment", "batch_size"}
    words = [f"teacher.{name}={_word(value)}" for name, value in student if name not in skipped]
    words += [f"teacher.augment.{name}={_word(value)}" for name, value in student.augment]
    return [*words, f"teacher.batch_size={student.batch_size // (1 + student.unlabeled_ratio)}"]


def _word(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value).replace('"', "")


def _pipeline(stage: str, run_dir: str, data: str, seed: int, *words: str) -> None:
    patterns = [f"data.{name}=[{data}/{name}/*.tar]" for name in ("labeled", "validation", "unlabeled", "test")]
    hashes = f"data.held_out_hashes=[{data}/validation/hashes.parquet,{data}/test/hashes.parquet]"
    command = [stage, "config=fashion_mnist", f"run_dir={run_dir}", f"seed={seed}", *patterns, hashes]
    command += [f"data.truth={data}/truth.parquet", *words]
    if pipeline(command) != 0:
        raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")


def _pack_truth(data: str) -> None:
    """Labeled shards of labeled and unlabeled images, with the truth."""
    folder = Path(data) / "truth"
    if (folder / "manifest.json").exists():
        return
    truth = {
        (shard, ordinal): label
        for shard, ordinal, label in zip(*pq.read_table(f"{data}/truth.parquet").to_pydict().values(), strict=True)
    }

    def samples() -> Iterator[tuple[str, Members]]:
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


def _accuracy(folder: str, shards: str, data: str) -> float:
    torch.set_num_threads(2)
    logits, labels = predict_split(open_split(shards, f"{data}/index"), load_predictor(folder, "cpu"))
    return top_k_accuracy(np.asarray(logits), labels)[0]


def _print_results(rows: Sequence[dict[str, float]], labels_per_class: int, split: str, seconds: float) -> None:
    print(
        f"\n{labels_per_class} labels a class, top-1 on the {split} images, {len(rows)} seeds (mean ± standard deviation):"
    )
    means = {arm: mean(row[arm] for row in rows) for arm in ARMS}
    for arm in ARMS:
        spread = stdev(row[arm] for row in rows) if len(rows) > 1 else 0.0
        print(f"  {arm:14} {means[arm]:7.2%} ± {spread:.2%}")
    gain = means["student"] - means["teacher"]
    gap = means["all_labels"] - means["teacher"]
    print(
        f"the student is {gain * 100:+.2f} points from its teacher, {gain / gap:.0%} of the way to all labels ({seconds:.0f} s)"
    )
    peers = {arm: round(means[arm], 4) for arm in ARMS if arm not in ("student", "teacher")}
    record = {
        "bench": "accuracy", "unit": "top-1 up", "ours": round(means["student"], 4), "peers": peers,
        "floor": round(means["teacher"], 4), "memory_mb": None, "seeds": len(rows), "split": split,
        "labels_per_class": labels_per_class,
    }  # fmt: skip
    print(json.dumps(record))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    try:
        bench(**parse_settings(bench, arguments, __doc__ or ""))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
