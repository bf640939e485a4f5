"""Converted models give the same logits on real images and carry class names and preprocessing; otherwise nothing is written."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from data.shards.samples import iterate_samples
from pipeline.models import convert
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from tests.conftest import DIGIT_NAMES, WriteDigits


@pytest.fixture
def weights(tmp_path: Path, write_digits: WriteDigits) -> Path:
    """A weights folder of a model with trained batch-norm statistics, beside shards of digits."""
    write_digits(tmp_path / "shards", 0, 40)
    torch.manual_seed(0)
    arguments = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    model = build_model("resnetrs26", 10, arguments)
    for _ in range(20):
        model(torch.rand(16, 3, 32, 32))
    info = WeightsInfo(
        model="resnetrs26", model_args=arguments, num_classes=10, class_names=DIGIT_NAMES, image_size=32, crop_pct=0.875,
        interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), temperature=1.5,
    )  # fmt: skip
    save_weights(str(tmp_path / "weights"), model.state_dict(), info)
    return tmp_path / "weights"


def run(weights: Path, name: str) -> int:
    shards = weights.parent / "shards/*.tar"
    return convert.main([f"weights={weights}", f"out={weights.parent / name}", f"images={shards}"])


def digits_of(weights: Path) -> list[Image.Image]:
    content = (weights.parent / "shards/shards-000000.tar").read_bytes()
    samples = list(iterate_samples(io.BytesIO(content)))
    return [Image.open(io.BytesIO(content[s.offset : s.offset + s.size])).convert("RGB") for s in samples]


def timms_logits(weights: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """timm's model loaded from the folder, the digits in timm's preprocessing, and their logits."""
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    images = torch.stack([transform(image) for image in digits_of(weights)])
    with torch.no_grad():
        return model, images, model(images)


def test_timm_knows_class_names_and_preprocessing(weights: Path) -> None:
    model, images, _ = timms_logits(weights)
    assert model.pretrained_cfg["label_names"] == DIGIT_NAMES
    assert images.shape[1:] == (3, 32, 32)
    assert resolve_data_config({}, model=model)["mean"] == [0.5, 0.4, 0.3]


@pytest.mark.slow
def test_onnx_gives_timms_logits_for_any_batch(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(weights, "student.onnx") == 0
    assert "from torch's on 16 images" in capsys.readouterr().out
    _, images, expected = timms_logits(weights)
    session = onnxruntime.InferenceSession(weights.parent / "student.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 2, 40):
        (found,) = session.run(["logits"], {"images": images[:count].numpy()})
        np.testing.assert_allclose(found, expected[:count].numpy(), atol=1e-4, rtol=0)
    config = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])
    assert config["label_names"] == DIGIT_NAMES
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert config["noisy_student"]["temperature"] == 1.5


def test_torch_export_gives_timms_logits_for_any_batch(weights: Path) -> None:
    assert run(weights, "student.pt2") == 0
    _, images, expected = timms_logits(weights)
    inside = {"config.json": ""}
    module = torch.export.load(weights.parent / "student.pt2", extra_files=inside).module()
    for count in (1, 2, 40):
        torch.testing.assert_close(module(images[:count]), expected[:count], atol=1e-4, rtol=0)
    assert json.loads(inside["config.json"])["label_names"] == DIGIT_NAMES


def test_without_shards_noise_is_compared(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main([f"weights={weights}", f"out={weights.parent / 'student.pt2'}"]) == 0
    assert "16 images of noise" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student.onnx", "student.pt2"])
def test_other_logits_are_an_error_and_nothing_is_written(
    weights: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = convert._export

    def wrong(model: torch.nn.Module, batch: torch.Tensor) -> torch.export.ExportedProgram:
        other = copy.deepcopy(model)
        other.get_parameter("fc.bias").data[3] += 0.001
        return right(other, batch)

    monkeypatch.setattr(convert, "_export", wrong)
    assert run(weights, name) == 2
    assert "its logits differ by 1.0" in capsys.readouterr().err
    assert not (weights.parent / name).exists()


def test_another_file_name_and_missing_weights_or_shards_are_refused(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(weights, "student.pb") == 2
    assert run(weights.parent / "nothing", "student.onnx") == 2
    assert convert.main([f"weights={weights}", "out=x.onnx", f"images={weights.parent}/no/*.tar"]) == 2
    errors = capsys.readouterr().err
    assert "expected a name that ends in .onnx or .pt2" in errors
    assert "nothing/config.json: not a weights folder of this pipeline" in errors
    assert "no/*.tar' matches no file" in errors
