"""Preprocessing is a value: derived from the training once, recorded in weights, read back from weights of any age."""

import json
from pathlib import Path

import pytest

from data.images.clean_view import EvalView
from pipeline.core.schema import AugmentConfig, TrainConfig
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import ModelError
from pipeline.models.weights import WeightsInfo, load_info, save_weights

ARGS = {"width": 0.125, "blocks": [1, 1, 1, 1]}
OLDEST = {
    "schema_version": 1, "model": "resnetrs26", "num_classes": 3, "image_size": 32, "crop_pct": 0.9, "interpolation": "bilinear",
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
}  # fmt: skip


def write_config(folder: Path, fields: dict[str, object]) -> str:
    (folder / "config.json").write_text(json.dumps({"noisy_student": fields}))
    return str(folder)


@pytest.mark.parametrize(("crop", "resize"), [("pad_crop", "pad"), ("random_resized_crop", "crop")])
def test_the_training_decides_once_how_inference_resizes(crop: str, resize: str) -> None:
    section = TrainConfig(image_size=48, precision="bf16", augment=AugmentConfig.model_validate({"crop": crop}))
    preprocessing = Preprocessing.of_training(section)
    assert (preprocessing.resize, preprocessing.precision) == (resize, "bf16")
    assert preprocessing.view("fast") == EvalView(48, 0.875, "bicubic", preprocessing.resize, "fast")


def test_weights_carry_it(tmp_path: Path) -> None:
    preprocessing = Preprocessing(32, 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), resize="pad", precision="bf16")
    info = WeightsInfo(
        model="resnetrs26", model_args=ARGS, num_classes=3, image_size=32, crop_pct=0.9, interpolation="bilinear",
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize="pad", precision="bf16",
    )  # fmt: skip
    save_weights(str(tmp_path), build_model("resnetrs26", 3, ARGS).state_dict(), info)
    assert Preprocessing.of_weights(load_info(str(tmp_path))) == preprocessing


def test_weights_from_before_precision_and_resize_were_recorded_stay_readable(tmp_path: Path) -> None:
    found = Preprocessing.of_weights(load_info(write_config(tmp_path, OLDEST)))
    assert found == Preprocessing(32, 0.9, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "crop", "fp32")


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", 0), ("crop_pct", 1.5), ("interpolation", "nearest"), ("std", [0.2, 0, 0.2])]
)
def test_a_value_out_of_range_is_refused_with_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: not a weights folder [\s\S]*{field}"):
        load_info(write_config(tmp_path, OLDEST | {field: value}))
