"""stage=pretrain: features without labels, as weights that timm loads; known to every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from data.shards.write import write_shard
from data.tables import read_table
from pipeline import stages
from pipeline.core.layout import Branch, Layout
from pipeline.core.stage import done_record
from pipeline.inference.stage_weights import load_predictor, read_info
from pipeline.run import main
from pipeline.training.checkpoint import load_newest
from teacher.screening.stream import LEFT_OUT_NAME
from tests.conftest import WriteDigits

SMALL = (
    "pretrain.model=resnetrs26", "pretrain.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", "pretrain.image_size=16",
    "pretrain.augment.crop=pad_crop", "pretrain.batch_size=20", "pretrain.epochs=2", "pretrain.warmup_epochs=1",
    "pretrain.eval_every_epochs=1", "pretrain.optimizer=momentum", "pretrain.projection_dim=8", "pretrain.loader_workers=0",
    "pretrain.log_every_steps=2", "threads=1",
)  # fmt: skip


@pytest.fixture
def words(tmp_path: Path, write_digits: WriteDigits) -> list[str]:
    """A command's words for 40 labeled and 60 unlabeled digits."""
    write_digits(tmp_path / "labeled", 0, 40)
    write_digits(tmp_path / "unlabeled", 100, 160, labeled=False, per_shard=30)
    data = [f"data.{name}=['{tmp_path}/{name}/*.tar']" for name in ("labeled", "unlabeled")]
    return [*data, *SMALL, f"run_dir={tmp_path}/run"]


def summary_of(run_dir: Path) -> dict[str, Any]:
    record = done_record(Layout(str(run_dir)).pretrain)
    assert record is not None
    return dict(record["summary"])


def test_its_weights_are_the_averaged_backbone_and_timm_loads_them(words: list[str], tmp_path: Path) -> None:
    assert main(["stage=pretrain", *words]) == 0
    layout = Layout(f"{tmp_path}/run")
    assert layout.pretrain == f"{tmp_path}/run/pretrain"
    info = read_info(layout.pretrain)
    assert (info.num_classes, info.image_size, info.resize) == (0, 16, "pad")
    checkpoint = load_newest(f"{layout.pretrain}/checkpoints")
    assert checkpoint is not None
    average = {name.removeprefix("backbone."): value for name, value in checkpoint["ema"]["module"].items()}
    ours = load_predictor(layout.pretrain, "cpu").model
    assert all(torch.equal(value, average[name]) for name, value in ours.state_dict().items())
    theirs = timm.create_model(f"local-dir:{layout.pretrain}/weights", pretrained=True).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))
    summary = summary_of(tmp_path / "run")
    assert (summary["images"], summary["used"], summary["steps"]) == (100, 100, 10)
    assert 0 <= summary["knn_top1"] <= 1
    assert summary["spread"] > 0.1


def test_simclrv2_has_a_head_of_three_layers_and_its_weights_are_the_backbones_alone(
    words: list[str], tmp_path: Path
) -> None:
    assert main(["stage=pretrain", *words, "pretrain.objective=simclrv2"]) == 0
    folder = tmp_path / "run/pretrain"
    checkpoint = load_newest(str(folder / "checkpoints"))
    assert checkpoint is not None
    trained = checkpoint["ema"]["module"]
    assert [name for name in trained if name.startswith("projector.") and trained[name].ndim == 2] == [
        f"projector.{layer}.weight" for layer in (0, 3, 6)
    ]
    weights = safetensors.torch.load_file(folder / "weights/model.safetensors")
    assert {f"backbone.{name}" for name in weights} == {name for name in trained if name.startswith("backbone.")}
    assert sorted(path.name for path in (folder / "weights").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_done_it_is_skipped_and_another_field_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stage=pretrain", *words]) == 0
    written = (tmp_path / "run/pretrain/done.json").read_bytes()
    assert main(["stage=pretrain", f"run_dir={tmp_path}/run", "pretrain.loader_workers=1"]) == 0
    assert "pretrain: done" in capsys.readouterr().out
    assert (tmp_path / "run/pretrain/done.json").read_bytes() == written
    assert main(["stage=pretrain", f"run_dir={tmp_path}/run", "pretrain.temperature=0.3"]) == 2
    assert "pretrain.temperature: 0.1 there, 0.3 now" in capsys.readouterr().err
    assert main(["stage=pretrain", f"run_dir={tmp_path}/run", "pretrain.temperature=0.3", "force=true"]) == 0
    assert (tmp_path / "run/pretrain.old-1/done.json").read_bytes() == written


def test_images_that_cannot_be_decoded_are_listed_and_not_trained_on(words: list[str], tmp_path: Path) -> None:
    write_shard(str(tmp_path / "more/more.tar"), [("bad", {"png": b"no image"})])
    unlabeled = f"data.unlabeled=['{tmp_path}/unlabeled/*.tar','{tmp_path}/more/*.tar']"
    assert main(["stage=pretrain", *words, unlabeled, "label.max_quarantined=0.05"]) == 0
    left_out = read_table(str(tmp_path / "run/pretrain" / LEFT_OUT_NAME), "")
    assert left_out.column("key").to_pylist() == ["bad"]
    assert summary_of(tmp_path / "run") | {"images": 101, "used": 100, "undecodable": 1} == summary_of(tmp_path / "run")


@pytest.mark.parametrize("reason", ["undecodable", "excluded"])
def test_a_labeled_image_that_is_left_out_is_not_measured(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    write_shard(str(tmp_path / "more/more.tar"), [("bad", {"png": b"no image", "cls": b"3"})])
    labeled = f"data.labeled=['{tmp_path}/more/*.tar','{tmp_path}/labeled/*.tar']"
    (tmp_path / "keys.txt").write_text("bad\n")
    others = {"undecodable": "label.max_quarantined=0.05", "excluded": f"data.exclude={tmp_path}/keys.txt"}
    assert main(["stage=pretrain", *words, labeled, "data.num_classes=10", others[reason]]) == 0
    assert summary_of(tmp_path / "run")[reason] == 1
    assert "(40 labeled images, leave-one-out)" in capsys.readouterr().out


def test_without_any_labeled_image_left_nothing_is_measured(words: list[str], tmp_path: Path) -> None:
    samples = [(key, {"png": b"no image", "cls": key.encode()}) for key in "34"]
    write_shard(str(tmp_path / "more/more.tar"), samples)
    labeled = f"data.labeled=['{tmp_path}/more/*.tar']"
    assert main(["stage=pretrain", *words, labeled, "data.num_classes=10", "label.max_quarantined=0.05"]) == 0
    assert "knn_top1" not in summary_of(tmp_path / "run")


def test_labels_are_not_needed(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=pretrain", *words, "data.labeled=[]"]) == 0
    assert "knn_top1" not in summary_of(tmp_path / "run")
    assert summary_of(tmp_path / "run")["images"] == 60
    assert main(["stage=pretrain", *SMALL, f"run_dir={tmp_path}/other"]) == 2
    assert "data.labeled and data.unlabeled are empty" in capsys.readouterr().err


def test_plan_and_status_know_it(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=pretrain", *words, "plan=true"]) == 0
    planned = capsys.readouterr().out
    assert "generation 1  pretrain  would run" in planned
    assert "10 steps of 20 (2 views of each)" in planned
    assert not (tmp_path / "run").exists()
    assert main(["stage=pretrain", *words]) == 0
    capsys.readouterr()
    assert main(["stage=status", f"run_dir={tmp_path}/run"]) == 0
    assert "generation 1  pretrain  done" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/summary.json").read_text())["pretrain"] == summary_of(tmp_path / "run")


def test_it_is_made_once_for_all_generations_and_for_studies() -> None:
    assert Layout("RUN", 3).pretrain == Branch("RUN/ablate/x/row", home="RUN").pretrain == "RUN/pretrain"
    assert "pretrain" not in {row.name for row in (*stages.rows_of(2), *stages.with_folder(2))}
    assert "pretrain" in {row.name for row in (*stages.rows_of(1), *stages.with_folder(1))}
