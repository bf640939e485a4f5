"""The commands of README, quickstart and docs/running.md, run as they stand there: on few images, with models that train in seconds."""

from __future__ import annotations

import html
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from setuptools import find_packages

from pipeline.core.config import load
from pipeline.core.recipes.sizes import Sizes
from pipeline.core.reference import reference
from pipeline.planning.memory import training_memory
from tests import HANGS_S
from tests.conftest import png

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "docs/quickstart.md",
    "README.md",
    "docs/running.md",
)  # in this order: later ones speak of the runs of earlier ones
NOT_RUN = {  # command → what runs it instead
    "make demo": "it is the demo",
    "make test": "it is this",
    "pip install -e '.[train]'": "installing is not for tests",
    "teacher.weights=lite0.safetensors": "tests/pipeline/models/test_real_model.py",
    "data.pack images=photos out=": "tests/pipeline/models/test_real_model.py",
    "stage=serve": "tests/pipeline/serving/test_serve.py",
}
TINY = """
threads: 1
teacher: &model {model: resnetrs26, model_args: {width: 0.125, blocks: [1, 1, 1, 1]}, image_size: 16, epochs: 6, batch_size: 40,
  warmup_epochs: 1, lr: 1.0, ema_decay: 0.9, bn_momentum: 1.0, weight_decay: 0.00004, loader_workers: 0, eval_every_epochs: 3,
  precision: fp32, augment: {num_ops: 1, crop_scale: [0.5, 1.0], rotation: 0, shear: 0, brightness: 0, contrast: 0, cutout: 0}}
student: {<<: *model, batch_size: 80}
label: {threads: 1, batch_size: 50}
"""


TINY_FINE = """
threads: 1
teacher: {image_size: 32, epochs: 2, freeze_backbone_epochs: 1, batch_size: 40, warmup_epochs: 0, loader_workers: 0,
  augment: {num_ops: 1}}
"""


def commands(document: str) -> list[str]:
    """The commands of its indented blocks, in order, lines that go on joined, comments left out."""
    lines = re.sub(r"\\\n\s+", "", (ROOT / document).read_text()).splitlines()
    indented = [line.strip() for line in lines if line.startswith("    ") and not line.startswith("     ")]
    return [shlex.join(shlex.split(line, comments=True)) for line in indented if line.partition(" ")[0] in _PROGRAMS]


_PROGRAMS = ("python", "make", "pip", "ray", "tensorboard")


def fenced(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(command)
    assert program == "python"
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=HANGS_S, check=False,
    )  # fmt: skip


def merge(base: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    for key, value in other.items():
        inner = base.get(key)
        base[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return base


@pytest.fixture
def photos(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> Path:
    """A folder with the photos that the documents speak of: digits, in a folder for each class, and unlabeled ones."""
    images, labels = digits
    for number, (image, label) in enumerate(zip(images[:900], labels[:900], strict=True)):
        part = "train" if number < 300 else "test" if number < 500 else "unlabeled"
        folder = tmp_path / "photos" / part / ("" if part == "unlabeled" else f"digit_{label}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(np.kron(image, np.ones((3, 3), np.uint8))))
    return tmp_path


@pytest.mark.slow
def test_every_command_does_what_the_documents_say(photos: Path) -> None:
    for name, text, tiny in zip(("mine", "fine"), fenced("docs/quickstart.md", "yaml"), (TINY, TINY_FINE), strict=True):
        (photos / f"{name}.yaml").write_text(yaml.safe_dump(merge(yaml.safe_load(text), yaml.safe_load(tiny))))
    (photos / "tiny.yaml").write_text(TINY)
    done: list[str] = []
    for document in DOCUMENTS:
        for command in commands(document):
            if command in done or any(words in command for words in NOT_RUN):
                continue
            endings = {
                "stage=ablate": " plan=true",  # two dozen trainings; tests/pipeline/studies/test_studies.py makes some
                "recipe=": " config=tiny.yaml",
            }
            ending = next((words for key, words in endings.items() if key in command), "")
            result = run(_here(command) + ending, photos)
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            done.append(command)
    assert sum("data.pack" in command for command in done) == 3
    assert (photos / "runs/mine/report.html").stat().st_size > 50_000
    for code in [code for document in DOCUMENTS for code in fenced(document, "python")]:
        assert run(shlex.join(["python", "-c", _here(code)]), photos).returncode == 0, code


def _here(words: str) -> str:
    """The demo's run and data stand for the user's."""
    return words.replace("runs/demo", "runs/mine").replace("datasets/fashion_mnist/", "shards/")


def test_the_quickstarts_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(fenced("docs/quickstart.md", "yaml")[0])
    loaded = load(str(tmp_path / "mine.yaml"), [])
    assert loaded.config.recipe == "small"
    config = loaded.with_sizes(Sizes(labeled=267, unlabeled=5411, classes=9, side=72)).config
    assert (config.teacher.batch_size, config.select.per_class) == (128, 330)
    assert training_memory(config.student, 1000).total < 4e9


def test_what_is_not_run_here_is_run_elsewhere_and_is_in_a_document() -> None:
    every = [command for document in DOCUMENTS for command in commands(document)]
    for words, instead in NOT_RUN.items():
        assert any(words in command for command in every), words
        assert not instead.startswith("tests/") or (ROOT / instead).exists(), instead


def test_the_reference_of_fields_is_that_of_the_code() -> None:
    assert (ROOT / "docs/fields.md").read_text() == reference(), "python -m pipeline.core.reference > docs/fields.md"


def test_the_picture_of_the_architecture_is_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs/draw_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    _, modules = drawing.imports(drawing.layers())
    shown = re.findall(r"<text [^>]*>([^<]+)</text>", (ROOT / "docs/architecture.svg").read_text())
    expected = {f"{name}  {count}" for name, count in modules.items()}
    assert {html.unescape(text) for text in shown} == expected, "python docs/draw_architecture.py"


def test_a_release_has_every_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    tops = ("pipeline", "teacher", "student", "data", "noisy_student")
    folders = {path.parent for top in tops for path in (ROOT / top).rglob("*.py")}
    released = find_packages(str(ROOT), **declared)
    assert sorted(released) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)


def test_links_between_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
