"""A whole pipeline on handwritten digits in seconds, through the command line, for the tests that need one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.tables import write_table
from tests import HANGS_S

Digits = tuple[np.ndarray, np.ndarray]  # images, labels
NUM_UNLABELED, PER_SHARD = 900, 150
CONFIG = """
threads: 1
data:
  labeled: ["{data}/labeled/*.tar"]
  validation: ["{data}/validation/*.tar"]
  unlabeled: ["{data}/unlabeled/*.tar"]
  test: ["{data}/test/*.tar"]
  held_out_hashes: ["{data}/validation/hashes.parquet", "{data}/test/hashes.parquet"]
  truth: "{data}/truth.parquet"
teacher: &model
  model: resnetrs26
  model_args: {{width: 0.125, blocks: [1, 1, 1, 1]}}
  image_size: 16
  mean: [0.3, 0.3, 0.3]
  std: [0.38, 0.38, 0.38]
  channels_last: true
  augment: {{crop: pad_crop, pad: 0, num_ops: 0, hflip: 0.0}}
  epochs: 48
  batch_size: 20
  lr: 4.0
  weight_decay: 0.0005
  warmup_epochs: 2
  ema_decay: 0.95
  dropout: 0.0
  bn_momentum: 0.1
  eval_every_epochs: 8
  loader_workers: 0
  checkpoint_every_s: 0.5
  log_every_steps: 20
label: {{workers: 2, batch_size: 50, threads: 1, decode_threads: 1, views: 2}}
select: {{confidence_threshold: 0.3, per_class: 60, max_copies: 4}}
evaluate: {{robustness_images: 40}}
student:
  <<: *model
  model_args: {{width: 0.1875, blocks: [1, 1, 1, 1]}}
  augment: {{crop: pad_crop, pad: 0, num_ops: 0, hflip: 0.0, rotation: 10, cutout: 2}}
  epochs: 48
  batch_size: 40
  lr: 2.0
  unlabeled_ratio: 1
  dropout: 0.1
"""


def write_digits_data(folder: Path, labels: np.ndarray, write: Callable[..., list[int]]) -> None:
    """labeled (100), validation (100), unlabeled (900), test (600) shards, the truth of the unlabeled, and config.yaml."""
    write(folder / "labeled", 0, 100)
    write(folder / "validation", 100, 200)
    write(folder / "unlabeled", 200, 200 + NUM_UNLABELED, labeled=False, per_shard=PER_SHARD)
    write(folder / "test", 1100, 1700, per_shard=300)
    numbers = np.arange(NUM_UNLABELED)
    truth = {
        "shard": [f"unlabeled-{number // PER_SHARD:06d}" for number in numbers],
        "ordinal": (numbers % PER_SHARD).astype(np.int32),
        "label": labels[200 : 200 + NUM_UNLABELED].astype(np.int32),
    }
    write_table(str(folder / "truth.parquet"), pa.table(truth))
    (folder / "config.yaml").write_text(CONFIG.format(data=folder))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.run", *words]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command line to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=HANGS_S, check=False, env=environment
    )


def summary_of(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "summary.json").read_text()))


def label_and_selection_bytes(run_dir: Path) -> dict[str, bytes]:
    """Every file that labels and selections consist of, but for clocks."""
    clocks = {"seconds.json", "progress.json", "timing.jsonl"}
    files = [*(run_dir / "gen-1/labels").rglob("*"), *(run_dir / "gen-1/selections").rglob("*")]
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in files if f.is_file() and f.name not in clocks}
