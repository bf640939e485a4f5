"""Backbones: weights load without their head; what does not fit is refused by name; a set is resized to the model's size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from data.settings import UsageError
from pipeline.core.config import load_config
from pipeline.core.schema import Config
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.transfer.backbones import open_backbone

ARGS: dict[str, Any] = {"width": 0.125, "blocks": [1, 1, 1, 1]}
WORDS = [
    "teacher.model=resnetrs26", "teacher.model_args={width: 0.125, blocks: [1, 1, 1, 1]}", "teacher.image_size=16",
    "teacher.augment.crop=pad_crop",
]  # fmt: skip


def config(weights: object, *words: str) -> Config:
    return load_config(None, [*WORDS, f"transfer.backbones.mine={weights}", *words])


def weights_in(folder: Path, num_classes: int = 10, resize: str = "pad") -> torch.nn.Module:
    torch.manual_seed(7)
    model = build_model("resnetrs26", num_classes, ARGS)
    info = WeightsInfo(
        model="resnetrs26", model_args=ARGS, num_classes=num_classes, image_size=32, crop_pct=0.875, interpolation="bilinear",
        resize=resize, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
    )  # fmt: skip
    save_weights(str(folder), model.state_dict(), info)
    return model


def test_a_folder_of_weights_gives_its_features_at_its_own_size(tmp_path: Path) -> None:
    model = weights_in(tmp_path / "weights").eval()
    backbone = open_backbone(config(tmp_path / "weights"), "mine")
    sight = backbone.preprocessing
    assert (sight.image_size, sight.crop_pct, sight.resize, sight.mean) == (32, 1.0, "crop", (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.fc(backbone.network().eval()(images)), model(images))  # type: ignore[operator]


def test_a_recorded_crop_stays_and_given_fields_win(tmp_path: Path) -> None:
    weights_in(tmp_path, resize="crop")
    words = f"{{weights: {tmp_path}, image_size: 64, mean: [0, 0, 0]}}"
    sight = open_backbone(config(words), "mine").preprocessing
    assert (sight.crop_pct, sight.image_size, sight.mean, sight.std) == (0.875, 64, (0, 0, 0), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_run_stands_for_its_newest_student_else_its_teacher(tmp_path: Path, stage: str) -> None:
    weights_in(tmp_path / "gen-1/teacher/weights")
    if stage == "student":
        weights_in(tmp_path / "gen-1/student/weights", num_classes=3)
    assert open_backbone(config(tmp_path), "mine").source == f"{tmp_path}/gen-1/{stage}/weights"
    assert open_backbone(config(f"{tmp_path}/gen-1/{stage}"), "mine").source == f"{tmp_path}/gen-1/{stage}/weights"


def test_a_file_has_the_teachers_model_and_a_wrong_one_is_refused_by_name(tmp_path: Path) -> None:
    model = weights_in(tmp_path)
    file = tmp_path / "model.safetensors"
    network = open_backbone(config(file), "mine").network()
    assert torch.equal(network.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    wider = config(file, "teacher.model_args={width: 0.25, blocks: [1, 1, 1, 1]}")
    with pytest.raises(
        ModelError, match=r"its conv1.0.weight has the shape \[4, 3, 3, 3\], the model's \[8, 3, 3, 3\]; give"
    ):
        open_backbone(wider, "mine").network()
    deeper = config(file, "teacher.model_args={width: 0.125, blocks: [2, 1, 1, 1]}")
    with pytest.raises(ModelError, match=r"no tensor layer1.1.conv1.weight"):
        open_backbone(deeper, "mine").network()
    shallower = dict(model.state_dict()) | {"layer9.weight": torch.zeros(1)}
    safetensors.torch.save_file(shallower, file)
    with pytest.raises(ModelError, match=r"a tensor layer9.weight, the model has none"):
        open_backbone(config(file), "mine").network()


def test_random_weights_are_of_the_seed_and_seeds_fill_paths_in(tmp_path: Path) -> None:
    digests = {open_backbone(config("random", f"seed={seed}"), "mine").digest() for seed in (0, 1)}
    assert len(digests) == 2
    first, again = (open_backbone(config("random"), "mine").network().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights_in(tmp_path / "run-1")
    assert open_backbone(config(f"{tmp_path}/run-{{seed}}", "seed=1"), "mine").source == f"{tmp_path}/run-1"


def test_what_is_not_there_is_refused_and_near_names_are_told(tmp_path: Path) -> None:
    for source, words in {
        tmp_path / "nowhere": "no folder with weights, and no timm model",
        tmp_path / "none.safetensors": "no such file",
        "resnet18d.ra2_in1kk": "did you mean",
    }.items():
        with pytest.raises(UsageError, match=rf"^transfer.backbones.mine={source}: .*{words}"):
            open_backbone(config(source), "mine")


def test_a_timm_model_has_timms_preprocessing() -> None:
    backbone = open_backbone(config("resnet18.a1_in1k"), "mine")
    assert (backbone.kind, backbone.preprocessing.image_size, backbone.preprocessing.mean[0]) == ("timm", 224, 0.485)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "lcnet_035"])
def test_features_are_pooled_and_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = build_model(name, 5, {}).eval()
    safetensors.torch.save_file(whole.state_dict(), tmp_path / "whole.safetensors")
    words = f"{{weights: {tmp_path}/whole.safetensors, model: {name}}}"
    network = open_backbone(config(words), "mine").network().eval()
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        features = network(images)
        assert torch.equal(timm_head(whole, features), whole(images))
    assert features.shape == (2, timm.create_model(name).head_hidden_size)


def timm_head(model: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    head = {"ResNet": "fc", "VisionTransformer": "head"}.get(type(model).__name__, "classifier")
    logits: torch.Tensor = model.get_submodule(head)(features)
    return logits
