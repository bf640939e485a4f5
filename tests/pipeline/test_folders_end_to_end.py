"""A first run is one command: from folders of pictures, as messy as people's, to a report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.labels.pseudo_labels import PseudoLabels
from tests import HANGS_S
from tests.picture_folder import CLASSES, picture, write, write_classes, write_messy

TINY = """
threads: 1
device: cpu
teacher: &model {model: resnetrs26, model_args: {width: 0.125, blocks: [1, 1, 1, 1]}, image_size: 16, epochs: 12, batch_size: 8,
  warmup_epochs: 0, lr: 1.0, bn_momentum: 0.1, ema_decay: 0, loader_workers: 0, augment: {num_ops: 1}, precision: fp32}
student: {<<: *model, unlabeled_ratio: 1}
label: {threads: 1, max_quarantined: 0}
select: {confidence_threshold: 0}
"""
COMMAND = (
    "stage=all config=tiny.yaml run_dir=run data.labeled=photos/train data.test=photos/test data.unlabeled=photos/unlabeled "
    "data.validation_share=0.3 data.truth=truth.csv"
)


def run(words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.run", *words.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS_S, check=False)


def make_photos(folder: Path) -> None:
    write_classes(folder / "photos" / "train", 10)
    write_classes(folder / "photos" / "test", 4, first=100)
    write_messy(folder / "photos" / "unlabeled" / "mess")
    rows = ["path,class"]
    for number in range(24):
        write(folder / "photos" / "unlabeled" / f"{number}.png", picture(200 + number, label=number % 3))
        rows.append(f"unlabeled/{number}.png,{CLASSES[number % 3]}")
    write(folder / "truth.csv", "\n".join(rows).encode())
    write(folder / "tiny.yaml", TINY.encode())


@pytest.mark.slow
def test_a_first_run_is_one_command_on_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_photos(tmp_path)
    first = run(COMMAND, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "data.unlabeled: packed the folder photos/unlabeled" in first.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels"]["images"] == 24 + 10, "what cannot be decoded is listed when packing"
    assert summary["labels"]["labels_right"] > 1 / 2, "of three classes, told apart by colour"
    assert (tmp_path / "run" / "report.html").exists()
    again = run(COMMAND, tmp_path)
    assert (again.returncode, "packed the folder" in again.stdout) == (0, False), again.stderr
    status = run("stage=status run_dir=run", tmp_path)
    assert "34 images of the folder" in status.stdout
    plan = run(f"{COMMAND} plan=true", tmp_path)
    assert "34 images of the folder" in plan.stdout, plan.stderr
    monkeypatch.chdir(tmp_path)
    assert len(list(PseudoLabels("run"))) == len(PseudoLabels("run").table())
    assert "photos/unlabeled" in (tmp_path / "run" / "config.yaml").read_text()
    write(tmp_path / "photos" / "unlabeled" / "late.png", picture(999))
    changed = run("stage=label run_dir=run", tmp_path)
    assert (changed.returncode, "late.png (is new)" in changed.stderr) == (2, True), changed.stderr
