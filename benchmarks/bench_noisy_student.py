"""Which of Noisy Student's findings hold at small scale: its ablations by stage=ablate, on Fashion-MNIST.

    python -m benchmarks.bench_noisy_student [seeds=2] [steps=400] [out=runs/bench_noisy_student]

500 labeled and 54,000 unlabeled images; rows are compared on the 5,000 development images; test images are not read. The recipe
is `config=fashion_mnist`, but the student starts from scratch and takes `steps` steps instead of 1,400, and labels come from one
view instead of four; the teacher is the demo's. The study is a run directory: the same command continues it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from data import fashion_mnist, storage
from data.settings import run_command
from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.core.layout import RESULTS_NAME, Layout
from pipeline.run import main as pipeline
from pipeline.studies.noisy_student import NOISY_STUDENT, RECIPE, TEACHER

DATA = "datasets/fashion_mnist-50-0"


class BenchmarkError(ValueError):
    """The study failed; the message gives its command."""


def bench(seeds: int = 2, steps: int = 400, out: str = "runs/bench_noisy_student") -> None:
    """Run or continue the study and print its table; see the module docstring."""
    fashion_mnist.prepare(DATA)
    words = [f"ablate.study={NOISY_STUDENT.name}", f"ablate.seeds={seeds}", *_data_words(), *_recipe_words(steps)]
    command = ["stage=ablate", "config=fashion_mnist", f"run_dir={out}", *words]
    if pipeline(command) != 0:
        raise BenchmarkError(f"this command failed: python -m pipeline.run {' '.join(command)}")
    results = json.loads(storage.read_text(storage.join(Layout(out).study(NOISY_STUDENT.name), RESULTS_NAME)))
    means = {row["name"]: round(row["mean"], 2) for row in results["rows"]}
    record: dict[str, Any] = {
        "bench": "noisy_student", "unit": "top-1 % up", "ours": means[RECIPE], "floor": means[TEACHER], "memory_mb": None,
        "peers": {name: value for name, value in means.items() if name not in (RECIPE, TEACHER)}, "seeds": seeds, "steps": steps,
        "split": "development",
    }  # fmt: skip
    print(json.dumps(record))


def _data_words() -> list[str]:
    return [
        f"data.labeled=[{DATA}/labeled/*.tar]", f"data.validation=[{DATA}/development/*.tar]",
        f"data.unlabeled=[{DATA}/unlabeled/*.tar]", "data.test=[]", f"data.held_out_hashes=[{DATA}/development/hashes.parquet]",
        f"data.truth={DATA}/truth.parquet",
    ]  # fmt: skip


def _recipe_words(steps: int) -> list[str]:
    """Return overrides: one training per core, without loader processes."""
    student = load_config("fashion_mnist", []).student
    images = open_split(f"{DATA}/labeled/*.tar", f"{DATA}/index").num_samples
    epochs = steps * (student.batch_size // (1 + student.unlabeled_ratio)) / images
    return [
        "threads=1", "label.views=1", "teacher.loader_workers=0", "teacher.eval_every_epochs=256", "student.loader_workers=0",
        f"student.epochs={epochs}", f"student.warmup_epochs={epochs * student.warmup_epochs / student.epochs}",
        f"student.eval_every_epochs={epochs}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
