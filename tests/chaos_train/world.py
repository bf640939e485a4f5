"""The runs to disturb: a teacher, labels and a selection of handwritten digits, and undisturbed students."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from tests.chaos.driver import Driver
from tests.chaos_train.recorded import VARIABLE
from tests.conftest import make_writer
from tests.digits_run import write_digits_data

STEPS = 60  # of 12 epochs of 100 labeled images, 20 of them and 20 pseudo-labeled ones per step
_WORDS = ("student.epochs=12", "student.eval_every_epochs=2", "student.log_every_steps=7", "student.loader_workers=1")


@dataclass(frozen=True)
class World:
    """A folder with data and runs."""

    folder: Path

    def reference(self, workers: int) -> Path:
        """The undisturbed run."""
        return self.folder / f"undisturbed-{workers}"

    def new_run(self, name: str) -> Path:
        """A run directory with all stages before the student done."""
        run_dir = self.folder / name
        for part in ("teacher", "labels", "near_duplicates", "selections"):
            shutil.copytree(self.folder / "begun/gen-1" / part, run_dir / "gen-1" / part)
        notes_of(run_dir).mkdir()
        return run_dir

    def start(self, run_dir: Path, *words: str, failpoint: str = "") -> Driver:
        """Start `stage=student` in a run directory; `words` override the configuration."""
        os.environ[VARIABLE] = str(notes_of(run_dir))
        command = ["stage=student", f"config={self.folder}/config.yaml", f"run_dir={run_dir}", *_WORDS, *words]
        return Driver(command, run_dir.with_suffix(".log"), failpoint, "tests.chaos_train.command")


def notes_of(run_dir: Path) -> Path:
    """Folder of the records of its steps."""
    return run_dir / "steps"


def make_world(folder: Path, sizes: set[int]) -> World:
    """Make data, teacher, labels and selection, and an undisturbed student for each number of training processes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    digits = (data.images[order] * 15.9).astype(np.uint8), data.target[order]
    write_digits_data(folder, digits[1], make_writer(digits))
    _finish(Driver(_before_the_student(folder), folder / "begun.log"))
    world = World(folder)
    for workers in sorted(sizes):
        run_dir = world.new_run(world.reference(workers).name)
        _finish(world.start(run_dir, f"student.workers={workers}"))
    return world


def _before_the_student(folder: Path) -> list[str]:
    words = ["stage=teacher,label", f"config={folder}/config.yaml", f"run_dir={folder}/begun"]
    return [*words, "teacher.epochs=12", "label.workers=1"]


def _finish(driver: Driver) -> None:
    if driver.wait() != 0:
        raise SystemExit(f"an undisturbed run failed:\n{driver.output()}")
