"""Which of Noisy Student's findings show on a small scale: its ablations by stage=ablate, on Fashion-MNIST.

    python -m benchmarks.bench_noisy_student [seeds=2] [steps=400] [out=runs/bench_noisy_student]

500 labeled and 54,000 unlabeled images; rows are compared on the 5,000 development images, and the test images are not read. The
recipe is `config=fashion_mnist` with `steps` steps of a student from scratch instead of 1,400, and labels from one view instead of
four; the teacher is the demo's. The study is a run directory: the same command continues.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from data import fashion_mnist, storage
from data.settings import run_command
from data.shards.split import open_split
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.run import main as pipeline
from pipeline.studies.noisy_student import NOISY_STUDENT, RECIPE, TEACHER
from pipeline.studies.table import RESULTS_NAME

DATA = "datasets/fashion_mnist-50-0"


class BenchmarkError(ValueError):
    """A study that failed; the message names its command."""


def bench(seeds: int = 2, steps: int = 400, out: str = "runs/bench_noisy_student") -> None:
    """Make or continue the study and print its table; see the module's text."""
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
    """One training per core: it loads its images itself."""
    student = load_config("fashion_mnist", []).student
    images = open_split(f"{DATA}/labeled/*.tar", f"{DATA}/index").num_samples
    epochs = steps * (student.batch_size // (1 + student.unlabeled_ratio)) / images
    return [
        "threads=1", "label.views=1", "teacher.loader_workers=0", "teacher.eval_every_epochs=256", "student.loader_workers=0",
        f"student.epochs={epochs}", f"student.warmup_epochs={epochs * student.warmup_epochs / student.epochs}",
        f"student.eval_every_epochs={epochs}",
    ]  # fmt: skip


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(bench, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
