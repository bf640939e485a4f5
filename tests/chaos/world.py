"""The runs to disturb: a small corpus with some damaged images, a teacher with random weights, and an undisturbed run of the label
stage to compare with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from data.shards.write import Fields, write_shards
from pipeline.models.registry import build_model
from tests.chaos.driver import Driver
from tests.conftest import png
from tests.digits_run import label_and_selection_bytes

NUM_SHARDS, PER_SHARD = 40, 25
DAMAGED = range(3, NUM_SHARDS * PER_SHARD, 111)  # one in 111 images is cut short
_MODEL = {"width": 0.25, "blocks": [1, 1, 1, 1]}
# ten views of a larger image: slow enough for faults to hit during labeling
_CONFIG = """
threads: 1
data: {{unlabeled: ["{folder}/unlabeled/*.tar"], num_classes: 10}}
teacher:
  model: resnetrs26
  model_args: {{width: 0.25, blocks: [1, 1, 1, 1]}}
  weights: "{folder}/random.pth"
  image_size: 96
label: {{workers: 2, batch_size: 8, views: 10, threads: 1, decode_threads: 1, max_quarantined: 0.1, cpus_per_worker: 0.5}}
select: {{confidence_threshold: 0.0, per_class: 20}}
"""


@dataclass(frozen=True)
class World:
    """A folder with corpus, configuration and the undisturbed run; `seconds` that run took."""

    folder: Path
    seconds: float = 0.0

    @property
    def reference(self) -> Path:
        """The undisturbed run."""
        return self.folder / "undisturbed"

    def new_run(self, name: str) -> Path:
        """Make a run directory with the teacher alone."""
        run_dir = self.folder / name
        shutil.copytree(self.reference / "gen-1/teacher", run_dir / "gen-1/teacher")
        return run_dir

    def start(self, run_dir: Path, *words: str, failpoint: str = "") -> Driver:
        """Start `stage=label` in a run directory; further words override the configuration."""
        command = ["stage=teacher,label", f"config={self.folder}/config.yaml", f"run_dir={run_dir}", *words]
        return Driver(command, run_dir.with_suffix(".log"), failpoint)

    def expected(self) -> dict[str, bytes]:
        """The expected files of labels and selection."""
        return label_and_selection_bytes(self.reference)


def make_world(folder: Path) -> World:
    """Make corpus, weights and configuration, and run undisturbed."""
    world = World(folder)
    write_shards(_samples(), str(folder / "unlabeled"), "unlabeled", PER_SHARD)
    torch.manual_seed(0)
    torch.save(build_model("resnetrs26", 10, _MODEL).state_dict(), folder / "random.pth")
    (folder / "config.yaml").write_text(_CONFIG.format(folder=folder))
    started, driver = time.monotonic(), world.start(world.reference)
    if driver.wait() != 0:
        raise SystemExit(f"the undisturbed run failed:\n{driver.output()}")
    return replace(world, seconds=time.monotonic() - started)


def _samples() -> Iterator[tuple[str, Fields]]:
    images = (load_digits().images * 15.9).astype(np.uint8)
    for number in range(NUM_SHARDS * PER_SHARD):
        content = png(images[number])
        yield f"{number:05d}", {"png": content[:40] if number in DAMAGED else content}
