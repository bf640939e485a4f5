"""100 labels that stage=suggest chooses against 100 drawn at random: Fashion-MNIST, 500 labels before, top-1 on the development images.

    python -m benchmarks.bench_suggest [seeds=0,1,2] [labels=100] [words="KEY=VALUE …"] [out=DIR]

Each seed has labeled images of its own. A teacher on 500 labels labels the unlabeled images and suggests; the same number is drawn at
random. Then the demo runs three times: with the suggested, with the random, and without more labels. Each run, and each
choice, is a folder, so the same command continues. No test image is read.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pyarrow.parquet as pq

from benchmarks.bench_accuracy import accuracy, run_stages
from data import fashion_mnist
from data.settings import run_command
from data.shards.image_reader import places_in, read_image
from data.shards.split import MANIFEST_NAME, open_split
from data.shards.write import Fields, labeled_members, write_shards
from pipeline.core.layout import Layout
from pipeline.suggest.stage import LIST_NAME

Chosen = list[tuple[str, int]]  # (shard, ordinal)
ARMS = ("none", "random", "suggested")


def bench(seeds: str = "0,1,2", labels: int = 100, words: str = "", out: str = "runs/bench_suggest") -> None:
    """Train all arms of all seeds and print their accuracies; see the module docstring."""
    rows = []
    for seed in map(int, seeds.split(",")):
        data = f"datasets/fashion_mnist-50-{seed}"
        fashion_mnist.prepare(data, 50, seed)
        rows.append(_seed(data, seed, labels, words.split(), f"{out}/{labels}-{seed}"))
        print(f"seed {seed}: " + "  ".join(f"{arm} {value:.2%}" for arm, value in rows[-1].items()), flush=True)
    _print_results(rows, labels)


def _seed(data: str, seed: int, number: int, words: Sequence[str], out: str) -> dict[str, float]:
    """Top-1 of the student of each arm, of one seed."""
    found = {}
    for arm in ARMS:
        labeled = [
            f"{data}/labeled/*.tar",
            *([f"{_more(arm, data, seed, number, out)}/*.tar"] if arm != "none" else []),
        ]
        run_stages(
            "stage=teacher,label,student", f"{out}/{arm}", data, seed, f"data.labeled=[{','.join(labeled)}]", *words
        )
        found[arm] = accuracy(Layout(f"{out}/{arm}").student, f"{data}/development/*.tar", data)
    return found


def _more(arm: str, data: str, seed: int, number: int, out: str) -> str:
    """The folder of the arm's further labeled shards; makes it where it is not there. The run without more labels must be done."""
    folder = f"{out}/labeled-{arm}"
    if not Path(folder, MANIFEST_NAME).exists():
        chosen = _random(data, seed, number) if arm == "random" else _suggested(data, seed, number, out)
        write_shards(labeled_samples(data, chosen), folder, "added", number, fashion_mnist.CLASS_NAMES)
    return folder


def _random(data: str, seed: int, number: int) -> Chosen:
    table = pq.read_table(f"{data}/truth.parquet", columns=["shard", "ordinal"]).to_pylist()
    rows = np.random.default_rng(seed).choice(len(table), number, replace=False)
    return [(table[row]["shard"], table[row]["ordinal"]) for row in rows]


def _suggested(data: str, seed: int, number: int, out: str) -> Chosen:
    folder = f"{out}/suggestions"
    if not Path(folder, LIST_NAME).exists():
        words = (f"suggest.images={number}", f"suggest.out={folder}", "suggest.format=csv")
        run_stages("stage=suggest", f"{out}/none", data, seed, *words)
    with Path(folder, LIST_NAME).open(newline="") as file:
        return [(row["shard"], int(row["ordinal"])) for row in csv.DictReader(file)]


def labeled_samples(data: str, chosen: Chosen) -> Iterator[tuple[str, Fields]]:
    """Yield (key, fields) of unlabeled images with their true labels."""
    truth = {(row["shard"], row["ordinal"]): row["label"] for row in pq.read_table(f"{data}/truth.parquet").to_pylist()}
    shards = {shard.name: shard for shard in open_split(f"{data}/unlabeled/*.tar", f"{data}/index").shards}
    for number, (name, ordinal) in enumerate(chosen):
        (place,) = places_in(shards[name].index().slice(ordinal, 1), ordinal)
        yield f"added{number:06d}", labeled_members("png", read_image(shards[name].url, place), truth[name, ordinal])


def _print_results(rows: Sequence[dict[str, float]], labels: int) -> None:
    print(
        f"\ntop-1 of the student on the development images, {len(rows)} seeds (mean ± standard deviation), {labels} more labels:"
    )
    means = {arm: mean(row[arm] for row in rows) for arm in ARMS}
    for arm, value in means.items():
        deviation = stdev(row[arm] for row in rows) if len(rows) > 1 else 0.0
        print(f"  {arm:10} {value:7.2%} ± {deviation:.2%}   {100 * (value - means['random']):+.2f} points")
    record = {
        "bench": "suggest", "unit": "top-1 up", "ours": means["suggested"], "peers": {"random": means["random"]},
        "floor": means["none"], "memory_mb": None, "seeds": len(rows), "split": "development",
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
