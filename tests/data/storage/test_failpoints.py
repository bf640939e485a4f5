"""Killed at each step of each commit of the label and select stages, the next process makes the same bytes.

Without Ray, whose worker pool is replaced by a loop: `make chaos` kills drivers and workers of whole runs.
"""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from data.labels.label_files import LabeledShard
from data.shards.split import Shard
from data.storage.failpoint import VARIABLE, failpoint
from pipeline.core.config import load_config
from pipeline.core.layout import Layout
from pipeline.core.stage import digest_of
from pipeline.inference.stage_weights import load_predictor
from pipeline.models.registry import build_model
from teacher.labeling import finished_shards as journal
from teacher.labeling import stage as label
from teacher.labeling.label_shard import ShardLabeler
from teacher.selection.stage import select
from teacher.train import train_teacher
from tests.conftest import make_writer
from tests.digits_run import Digits, label_and_selection_bytes

MODEL = {"width": 0.125, "blocks": [1, 1, 1, 1]}
STEPS = ("before-write", "after-write", "before-rename", "after-rename")
FILES = (
    "started.json", "unlabeled-000001.parquet", "journal.json", "quarantine.parquet", "validation.parquet", "manifest.json",
    "done.json", "selection.json", "current",
)  # fmt: skip
FAILPOINTS = [
    *(f"{step}/{file}" for file in FILES for step in STEPS),
    # a stage's second file of that name is the selection's
    *(f"{step}/{file}:2" for file in ("started.json", "unlabeled-000001.parquet", "done.json") for step in STEPS),
    *(f"{moment}-done/{stage}" for moment in ("before", "after") for stage in ("label", "select")),
]
# Forked from a process that has imported all this, and nothing else: a run takes a fraction of a second.
PROCESSES = multiprocessing.get_context("forkserver")


class Loop:
    """What `ShardPool` does, in this process."""

    num_ready, images_in_flight, replaced = 1, 0, 0

    def __init__(self, make: object, options: object, shards: Sequence[Shard], urls: Sequence[str]) -> None:
        self._work, folder = list(zip(shards, urls, strict=True)), Path(urls[0]).parent
        self._teacher = str(folder.parent / "teacher")
        self._made_by = digest_of(json.loads((folder / "started.json").read_text())["fingerprint"])

    def run(self) -> Iterator[LabeledShard]:
        labeler = ShardLabeler(load_predictor(self._teacher, "cpu", 8), 10, 10, 1, 1, self._made_by)
        return (labeler.label(shard, url) for shard, url in self._work)

    def seconds(self) -> dict[str, float]:
        return {}


def run(folder: Path, run_dir: Path, name: str) -> None:
    """Label and select; `name` is the failpoint."""
    os.environ[VARIABLE] = name
    torch.set_num_threads(1)
    label.ShardPool = Loop  # type: ignore[misc, assignment]
    label.start_ray = lambda address: None
    journal._EVERY_S = 0.0
    words = [
        f"run_dir={run_dir}", f"data.unlabeled=[{folder}/unlabeled/*.tar]", "data.num_classes=10", "teacher.model=resnetrs26",
        "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", f"teacher.weights={folder}/elsewhere.pth",
        "teacher.image_size=32", "label.threads=1", "label.batch_size=8", "select.confidence_threshold=0", "device=cpu",
    ]  # fmt: skip
    config, layout = load_config(None, words), Layout(str(run_dir))
    train_teacher(config, layout)
    label.label(config, layout)
    select(config, layout)


def exit_code(folder: Path, run_dir: Path, name: str = "") -> int | None:
    process = PROCESSES.Process(target=run, args=(folder, run_dir, name))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Digits) -> Path:
    """A folder with three shards and a whole run."""
    folder = tmp_path_factory.mktemp("failpoints")
    make_writer(digits)(folder / "unlabeled", 0, 24, labeled=False, per_shard=8)
    torch.manual_seed(0)
    torch.save(build_model("resnetrs26", 10, MODEL).state_dict(), folder / "elsewhere.pth")
    PROCESSES.set_forkserver_preload([__name__])
    assert exit_code(folder, folder / "whole") == 0
    return folder


@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_there_the_next_run_makes_the_same_bytes(whole: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(whole / "whole/gen-1/teacher", tmp_path / "run/gen-1/teacher")
    assert exit_code(whole, tmp_path / "run", name) == -signal.SIGKILL
    expected = label_and_selection_bytes(whole / "whole")
    for file, content in label_and_selection_bytes(tmp_path / "run").items():
        if file.endswith(".parquet") and ".tmp-" not in file:
            assert content == expected[file], f"{file} is not whole"
    assert exit_code(whole, tmp_path / "run") == 0
    assert label_and_selection_bytes(tmp_path / "run") == expected


def test_without_the_variable_a_failpoint_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    failpoint("before-write/done.json")
