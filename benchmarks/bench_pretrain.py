"""What self-supervised pretraining gains the demo's teacher: Fashion-MNIST, 500 labels, top-1 on the development images.

    python -m benchmarks.bench_pretrain [seeds=0,1,2] [objectives=simclr,simclrv2,byol] [words="pretrain.lr=0.1 …"] [out=DIR]

Each seed has labeled images of its own. For each seed and objective: learn features on labeled and unlabeled images without labels, and
train the demo's teacher from them (`teacher.init=pretrain`), beside the teacher from scratch. Each is a run directory, so the same
command continues. No test image is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import mean, stdev

from benchmarks.bench_accuracy import accuracy, run_stages
from data import fashion_mnist
from data.settings import run_command
from pipeline.core.layout import Layout
from pipeline.core.stage import require_done
from pipeline.core.timing import read_timing

SCRATCH = "scratch"
_FINE_TUNED = ("teacher.init=pretrain",)


def bench(
    seeds: str = "0,1,2", objectives: str = "simclr,simclrv2,byol", words: str = "", out: str = "runs/bench_pretrain"
) -> None:
    """Train all arms of all seeds and print their accuracies; see the module docstring."""
    arms = (SCRATCH, *objectives.split(","))
    rows = []
    for seed in map(int, seeds.split(",")):
        data = f"datasets/fashion_mnist-50-{seed}"
        fashion_mnist.prepare(data, 50, seed)
        rows.append({arm: _top1(arm, f"{out}/{arm}-{seed}", data, seed, words.split()) for arm in arms})
        print(f"seed {seed}: " + "  ".join(f"{arm} {value:.2%}" for arm, value in rows[-1].items()), flush=True)
    _print_results(arms, rows)


def _top1(arm: str, run_dir: str, data: str, seed: int, words: Sequence[str]) -> float:
    """Train an arm, where that is left to do; return the teacher's top-1 on the development images."""
    layout = Layout(run_dir)
    if arm == SCRATCH:
        run_stages("stage=teacher", run_dir, data, seed)
    else:
        run_stages("stage=pretrain,teacher", run_dir, data, seed, f"pretrain.objective={arm}", *_FINE_TUNED, *words)
        found = require_done(layout.pretrain, "pretrain")["summary"]
        seconds = read_timing(layout.pretrain).seconds
        print(
            f"{run_dir}: pretrained for {seconds:.0f} s; kNN top-1 {found['knn_top1']:.2%}, spread {found['spread']:.2f}"
        )
    return accuracy(layout.teacher, f"{data}/development/*.tar", data)


def _print_results(arms: Sequence[str], rows: Sequence[dict[str, float]]) -> None:
    print(f"\ntop-1 of the teacher on the development images, {len(rows)} seeds (mean ± standard deviation):")
    means = {arm: mean(row[arm] for row in rows) for arm in arms}
    for arm, value in means.items():
        deviation = stdev(row[arm] for row in rows) if len(rows) > 1 else 0.0
        print(f"  {arm:10} {value:7.2%} ± {deviation:.2%}   {100 * (value - means[SCRATCH]):+.2f} points")
    best = max(arms[1:], key=means.__getitem__)
    record = {
        "bench": "pretrain", "unit": "top-1 up", "ours": means[best], "best": best,
        "peers": {arm: value for arm, value in means.items() if arm != best}, "floor": means[SCRATCH], "memory_mb": None,
        "seeds": len(rows), "split": "development",
    }  # fmt: skip
    print(json.dumps(record))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
