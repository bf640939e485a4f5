"""The model card beside weights: what it says is true, and its code runs."""

from __future__ import annotations

import re
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from noisy_student import Classifier, load_image
from pipeline.inference.weights_card import CARD_NAME, write_weights_card
from pipeline.models.external_weights import weights_digest
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights

TEST = {"top1": 0.8423, "top5": 0.9865, "images": 10_000, "calibration_error": 0.0123, "parameters": 1_440_000}
ARGUMENTS = {"width": 0.125, "blocks": [1, 1, 1, 1]}


def info_of(**fields: Any) -> WeightsInfo:
    values: dict[str, Any] = {
        "model": "resnetrs26", "model_args": ARGUMENTS, "num_classes": 3, "class_names": ["cat", "a | b", "*dog*"], "image_size": 32,
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "temperature": 1.25,
        "validation_top1": 0.75, "generation": 1,
        "provenance": {"config": {"student.model": "resnetrs26", "student.epochs": 9.5, "seed": 0}, "inputs": {"labeled": "ab12"}},
    }  # fmt: skip
    return WeightsInfo(**(values | fields))


def card_of(folder: Path, info: WeightsInfo, test: dict[str, Any] | None = None) -> str:
    write_weights_card(str(folder), info, test)
    return (folder / CARD_NAME).read_text()


def test_the_card_has_what_hugging_face_reads(tmp_path: Path) -> None:
    _, head, body = card_of(tmp_path, info_of(), TEST).split("---\n", 2)
    fields = yaml.safe_load(head)
    assert (fields["library_name"], fields["pipeline_tag"]) == ("timm", "image-classification")
    results = fields["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [
        ("test images", 0.8423),
        ("validation images", 0.75),
    ]
    for words in ("transparency on white", "| test images | 84.23 % |", "epochs: `9.5`", "labeled: digest `ab12`", "a \\| b",
                  "\\*dog\\*", "to 36 pixels (bicubic)", "softmax of logits / 1.25"):  # fmt: skip
        assert words in body, words


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = card_of(tmp_path, info_of(validation_top1=None, class_names=None, generation=0, provenance={}, resize="pad"))
    assert "model-index" not in text
    assert "Not known: there were no validation images" in text
    assert "not calibrated, and mostly too high" in text
    assert "smaller images are centred on black" in text
    assert "A teacher: no pseudo-labels were used" in text


def test_its_code_gives_the_classifiers_predictions(tmp_path: Path) -> None:
    info = info_of()
    save_weights(str(tmp_path), build_model("resnetrs26", 3, ARGUMENTS).state_dict(), info)
    digest = weights_digest(str(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    blocks = re.findall(r"```python\n(.*?)```", card_of(tmp_path, info), re.DOTALL)
    with chdir(tmp_path):
        variables: dict[str, Any] = {}
        for code in blocks:
            exec(code.replace("FOLDER", "."), variables)
    (found,) = variables["predictions"]
    assert variables["names"] == ["cat", "a | b", "*dog*"]
    assert [name for name, _ in found.top_k] == [
        variables["names"][n] for n in variables["probabilities"].argsort(descending=True)[0]
    ]
    np.testing.assert_allclose(
        found.confidence, float(variables["probabilities"].detach().max()), atol=0.02
    )  # its paste rounds otherwise
    exact = variables["transform"](load_image(tmp_path / "photo.png"))[None]
    with torch.inference_mode():
        logits = variables["model"](exact)
    (pillow,) = Classifier(str(tmp_path), decoder="pillow")([tmp_path / "photo.png"])
    assert pillow.confidence == pytest.approx(float((logits / 1.25).softmax(1).max()), abs=1e-5)
    assert weights_digest(str(tmp_path)) == digest, "the card is not part of the weights"


def test_a_card_that_is_right_is_not_written_again(tmp_path: Path) -> None:
    card_of(tmp_path, info_of(), TEST)
    before = (tmp_path / CARD_NAME).stat().st_mtime_ns
    card_of(tmp_path, info_of(), TEST)
    assert (tmp_path / CARD_NAME).stat().st_mtime_ns == before
