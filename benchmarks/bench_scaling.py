"""Which of the scaling strategies of ResNet-RS (arXiv 2103.07579, section 4) show at small scale: stage=ablate ablate.study=scaling.

    python -m benchmarks.bench_scaling [seeds=2] [minutes=50] [widths=0.125,0.25,0.5] [depths=26,50,101] [sizes=16,32]
                                       [epochs=2,6,18] [out=runs/bench_scaling]

Fashion-MNIST with 5,000 labeled images (500 a class), compared on the 5,000 development images; test images are not read. The recipe is
the demo's teacher, with ResNet-RS's regularization scaled down in the longest trainings. The largest model has over 100 times the FLOPs
of the smallest. After `minutes` no training starts; the same command continues, and prints the findings when all are done.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from data import fashion_mnist, storage
from data.settings import run_command
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.pages.scaling_plot import FINDINGS_NAME, SCALING
from pipeline.run import main as pipeline
from pipeline.studies.resnet_rs import TEACHER_RECIPE
from pipeline.studies.stage import open_study
from pipeline.trials.trial import run_trials

LABELS_PER_CLASS = 500
DATA = f"datasets/fashion_mnist-{LABELS_PER_CLASS}-0"
RECIPE = [
    f"data.labeled=[{DATA}/labeled/*.tar]", f"data.validation=[{DATA}/development/*.tar]", "data.unlabeled=[]", "data.test=[]",
    "data.held_out_hashes=[]", "data.truth=null", "threads=1", "teacher.loader_workers=0", "teacher.batch_size=64", "teacher.lr=0.2",
    "teacher.epochs=18", "teacher.warmup_epochs=1", "teacher.ema_decay=0.99", "teacher.label_smoothing=0.1", "teacher.dropout=0.25",
    "teacher.stochastic_depth=0.1", "teacher.augment.num_ops=2", "teacher.augment.magnitude=5",
]  # fmt: skip
_AT_ONCE = 4  # trainings between two looks at the clock


class BenchmarkError(ValueError):
    """A study failed; the message gives its command."""


def bench(
    seeds: int = 2,
    minutes: float = 50,
    widths: str = "0.125,0.25,0.5",
    depths: str = "26,50,101",
    sizes: str = "16,32",
    epochs: str = "2,6,18",
    out: str = "runs/bench_scaling",
) -> None:
    """Train what is missing until the time is over; see the module docstring."""
    deadline = time.monotonic() + 60 * minutes
    fashion_mnist.prepare(DATA, LABELS_PER_CLASS)
    axes = {"width": widths, "depth": depths, "image_size": sizes, "epochs": epochs}
    words = [f"ablate.grid.{name}=[{values}]" for name, values in axes.items()]
    words += [*RECIPE, f"ablate.study={SCALING}", f"ablate.seeds={seeds}", f"run_dir={out}"]
    _, trials = open_study(config := load_config("fashion_mnist", words), Layout(config.run_dir))
    while (todo := [trial for trial in trials if trial.result() is None]) and time.monotonic() < deadline:
        run_trials(f"study {SCALING}", todo[:_AT_ONCE], TEACHER_RECIPE)
    missing, found = len(todo), list[dict[str, Any]]()
    if missing:
        print(f"{missing} of {len(trials)} trainings are missing: the same command continues")
    else:
        command = ["stage=ablate", "config=fashion_mnist", *words]
        if pipeline(command) != 0:
            raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")
        content = storage.read_text(storage.join(Layout(out).study(SCALING), FINDINGS_NAME))
        found = json.loads(content)["findings"]
    record: dict[str, Any] = {
        "bench": "scaling",
        "unit": "findings",
        "ours": found,
        "peers": {},
        "floor": None,
        "memory_mb": None,
    }
    print(json.dumps(record | {"seeds": seeds, "missing": missing}))


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
