"""Which of ResNet-RS's findings hold at small scale: both studies of stage=ablate on Fashion-MNIST.

    python -m benchmarks.bench_ablate [seeds=3] [epochs=32] [studies=resnet_rs,weight_decay] [out=runs/bench_ablate]

1,000 labeled images (100 per class), compared on the 5,000 development images; test images are not read. The recipe is
ResNet-RS's, scaled down: a weaker RandAugment, and 100 times its weight decay, because 500 steps are 200 times fewer than the
paper's. Each study is a run directory: the same command continues it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from data import fashion_mnist, storage
from data.settings import UsageError, run_command
from pipeline.core.layout import RESULTS_NAME, Layout
from pipeline.run import main as pipeline

LABELS_PER_CLASS = 100
DATA = f"datasets/fashion_mnist-{LABELS_PER_CLASS}-0"
RECIPE = [
    "config=fashion_mnist", f"data.labeled=[{DATA}/labeled/*.tar]", f"data.validation=[{DATA}/development/*.tar]",
    "data.unlabeled=[]", "data.test=[]", "data.held_out_hashes=[]", "data.truth=null", "threads=1", "teacher.loader_workers=0",
    "teacher.batch_size=64", "teacher.lr=0.4", "teacher.warmup_epochs=2", "teacher.weight_decay=0.004", "teacher.ema_decay=0.99",
    "teacher.label_smoothing=0.1", "teacher.stochastic_depth=0.1", "teacher.dropout=0.25",
    "teacher.augment.pad=2", "teacher.augment.num_ops=2", "teacher.augment.magnitude=5",
]  # fmt: skip
# stem: 32 gives ResNet-D's stem the 64 channels of the plain one, so that they differ in nothing else. bn_momentum=1.0 is the
# published rule (the EMA averages last-batch statistics), a part of the additive study; weight_decay has the config's running mean.
STUDIES = {
    "resnet_rs": ["teacher.model_args={width: 0.25, blocks: [1, 1, 2, 1], stem: 32}", "teacher.bn_momentum=1.0"],
    "weight_decay": ["teacher.model_args={width: 0.25, blocks: [1, 1, 2, 1]}"],
}


class BenchmarkError(ValueError):
    """A study failed; the message gives its command."""


def bench(seeds: int = 3, epochs: float = 32, studies: str = ",".join(STUDIES), out: str = "runs/bench_ablate") -> None:
    """Run or continue the studies and print their tables; see the module docstring."""
    names = studies.split(",")
    if not set(names) <= set(STUDIES):
        raise UsageError(f"studies={studies}: expected some of {', '.join(STUDIES)}")
    fashion_mnist.prepare(DATA, LABELS_PER_CLASS)
    gains = {name: _gain(_run_study(name, seeds, epochs, storage.join(out, name))) for name in names}
    record = {
        "bench": "ablate", "unit": "top-1 points up", "ours": gains, "peers": {}, "floor": None, "memory_mb": None, "seeds": seeds,
    }  # fmt: skip
    print(json.dumps(record))


def _run_study(name: str, seeds: int, epochs: float, run_dir: str) -> list[dict[str, Any]]:
    """Run a study; return the rows of its results."""
    words = [
        f"ablate.study={name}",
        f"ablate.seeds={seeds}",
        f"teacher.epochs={epochs}",
        f"teacher.eval_every_epochs={epochs}",
    ]
    command = ["stage=ablate", f"run_dir={run_dir}", *RECIPE, *STUDIES[name], *words]
    if pipeline(command) != 0:
        raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")
    results = storage.join(Layout(run_dir).study(name), RESULTS_NAME)
    rows: list[dict[str, Any]] = json.loads(storage.read_text(results))["rows"]
    return rows


def _gain(rows: list[dict[str, Any]]) -> float:
    """Return the top-1 gain of the last row over the first, in points."""
    return round(float(rows[-1]["mean"] - rows[0]["mean"]), 2)


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
