"""Other projects read what we hand out with their own released code: the lines of docs/consumers.md, run as they stand there."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from pipeline.core.layout import Layout
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from tests.conftest import DIGIT_NAMES
from tests.label_server import label_server
from tests.label_sources import exported_run, said_by_stages

PAGE = Path(__file__).parents[3] / "docs/consumers.md"
BLOCK = re.compile(r"^## (?P<title>[^\n]+)$|^```(?P<kind>python|sh)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
Labels = dict[str, int]

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def blocks() -> dict[str, list[str]]:
    """Code of docs/consumers.md by heading."""
    found: dict[str, list[str]] = {}
    title = ""
    for match in BLOCK.finditer(PAGE.read_text()):
        title = match["title"] or title
        if match["code"]:
            found.setdefault(title, []).append(match["code"])
    return found


class Reader:
    """Runs the blocks, with the paths of the tests."""

    def __init__(self, folder: Path, address: str, truth: Labels) -> None:
        self.folder, self.address, self.truth = folder, address, truth

    def code(self, title: str, number: int = 0) -> str:
        code = blocks()[title][number].replace("http://localhost:8080", self.address)
        return code.replace("runs/mine", str(self.folder / "run"))

    def run(self, title: str, number: int = 0) -> dict[str, Any]:
        """The variables that a block leaves behind."""
        variables: dict[str, Any] = {"__name__": "consumer"}
        exec(compile(self.code(title, number), f"{PAGE.name}: {title}", "exec"), variables)
        return variables

    def shell(self, title: str, number: int = 0) -> None:
        """Run a block as commands, where `python` is this one."""
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(PAGE.parents[1])}
        subprocess.run(["sh", "-e", "-c", self.code(title, number)], check=True, env=os.environ | path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("consumers")
    _, layout = exported_run(folder, digits)
    save_student(layout)
    with label_server(folder / "run/exports/v1") as server:
        yield Reader(folder, server.address, {key: label for key, (label, *_) in said_by_stages(layout).items()})
    ray.shutdown()


def save_student(layout: Layout) -> None:
    """Its weights alone."""
    arguments = {"width": 0.125, "blocks": [1, 1, 1, 1]}
    info = WeightsInfo(model="resnetrs26", model_args=arguments, num_classes=10, class_names=DIGIT_NAMES, image_size=32, crop_pct=1,
                       interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), temperature=1.25)  # fmt: skip
    save_weights(f"{layout.student}/weights", build_model("resnetrs26", 10, arguments).state_dict(), info)


def test_every_block_of_the_page_is_run_here() -> None:
    counts = {title: len(codes) for title, codes in blocks().items()}
    assert counts == {
        "PseudoLabels": 1, "webdataset": 2, "wids": 1, "timm": 1, "Hugging Face datasets": 2, "Ray Data": 1, "DuckDB": 1,
        "Polars": 1, "curl": 1, "The pixels": 1, "Weights": 3,
    }  # fmt: skip


def test_pseudo_labels(reader: Reader) -> None:
    found = reader.run("PseudoLabels")
    sure = {row["__key__"] for row in found["table"].to_pylist() if row["confidence"] >= 0.5}
    assert found["labels"] == {key: label for key, label in reader.truth.items() if key in sure}
    assert found["images"].shape[1:] == (3, 32, 32)
    assert found["names"][3] == "digit_3"


@pytest.mark.parametrize("number", [0, 1], ids=["folder", "server"])
def test_webdataset(reader: Reader, number: int) -> None:
    assert reader.run("webdataset", number)["labels"] == reader.truth


def test_wids(reader: Reader) -> None:
    found = reader.run("wids")
    assert found["labels"] == reader.truth
    assert len(found["dataset"]) == len(reader.truth)


def test_wids_from_a_server(reader: Reader, tmp_path: Path) -> None:
    folder = str(reader.folder / "run/exports/v1")
    code = (
        reader.code("wids").replace(f"{folder}/wids.json", f"{reader.address}/wids.json").replace(folder, str(tmp_path))
    )
    variables: dict[str, Any] = {}
    exec(code, variables)
    assert variables["labels"] == reader.truth


def test_timm(reader: Reader) -> None:
    found = reader.run("timm")
    assert sorted(found["labels"]) == sorted(reader.truth.values())
    assert len(found["losses"]) >= len(reader.truth) // 8
    assert np.isfinite(found["losses"]).all()


@pytest.mark.parametrize("number", [0, 1], ids=["files", "card"])
def test_hugging_face_datasets(reader: Reader, number: int) -> None:
    found = reader.run("Hugging Face datasets", number)
    assert found["labels"] == reader.truth
    assert next(iter(found["dataset"]))["png"].size == (8, 8)


@pytest.mark.slow
def test_ray_data(reader: Reader) -> None:
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    found = reader.run("Ray Data")
    assert found["labels"] == reader.truth
    assert found["table"].count() == len(reader.truth)
    assert 0 < found["sure"] < len(reader.truth)


def test_duckdb(reader: Reader) -> None:
    found = reader.run("DuckDB")
    assert found["labels"] == reader.truth
    assert len(found["rows"]) == len(reader.truth)
    assert sum(count for _, count, _ in found["per_class"]) == len(reader.truth)


def test_polars(reader: Reader) -> None:
    found = reader.run("Polars")
    assert found["labels"] == reader.truth
    assert found["table"].height == len(reader.truth)


def test_curl(reader: Reader, tmp_path: Path) -> None:
    (tmp_path / "pseudo-000000.tar").write_bytes(
        (reader.folder / "run/exports/v1/pseudo-000000.tar").read_bytes()[:5000]
    )
    with chdir(tmp_path):
        reader.shell("curl")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    labels = {path.stem: int(path.read_text()) for path in tmp_path.glob("*.cls")}
    assert len(labels) == manifest["shards"][0]["num_samples"]
    assert labels.items() <= reader.truth.items()
    assert {path.stem for path in tmp_path.glob("*.png")} == labels.keys()


def test_the_pixels(reader: Reader, tmp_path: Path) -> None:
    Image.new("RGBA", (64, 48), (0, 0, 0, 0)).save(tmp_path / "photo.png")
    with chdir(tmp_path):
        assert reader.run("The pixels")["image"].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.slow
def test_weights(reader: Reader, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.png")
    with chdir(tmp_path):
        in_timm = reader.run("Weights", 0)
    assert in_timm["names"] == DIGIT_NAMES
    assert in_timm["logits"].shape == (1, 10)
    with chdir(tmp_path):
        reader.shell("Weights", 1)
        found = reader.run("Weights", 2)
    with torch.no_grad():
        expected = in_timm["model"](torch.from_numpy(found["images"])).numpy()
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4, rtol=0)
    assert (found["names"], found["temperature"]) == (DIGIT_NAMES, 1.25)
