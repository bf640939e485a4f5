"""Another project installs the wheel without extras, beside a `data/` of its own, and reads a run, an export and a server."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests import HANGS_S
from tests.label_server import label_server
from tests.label_sources import exported_run

ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "timm", "torch", "torchvision", "torchmetrics", "matplotlib", "jinja2", "safetensors", "pandas"}
READ = """
import json, sys
import data
from noisy_student import DataError, PseudoLabels, load_image

assert data.OWN == "the project's"
found = {}
for source in sys.argv[1:]:
    labels = PseudoLabels(source)
    rows = labels.table().to_pylist()
    assert len(labels) == len(rows) and repr(labels).startswith(f"PseudoLabels({source!r}): ")
    assert [label for image, label in labels if image.mode == "RGB"] == [row["label"] for row in rows]
    threes = PseudoLabels(source, classes=["digit_3"]).table().column("label").to_pylist()
    assert threes and set(threes) == {3}
    found[source] = {row["__key__"]: row["label"] for row in rows}
    try:
        labels.dataset()
    except ModuleNotFoundError as error:
        assert "[train]" in str(error), error
    else:
        raise AssertionError("without torch")
assert "torch" not in sys.modules
print(json.dumps(found))
"""
TRAIN = """
import json, sys
import numpy as np
import data
from noisy_student import PseudoLabels
from torch.utils.data import DataLoader


def shape(image):
    assert data.OWN == "the project's"
    return np.array(image).shape


if __name__ == "__main__":
    found = {}
    for source in sys.argv[1:]:
        dataset = PseudoLabels(source).dataset(shape, as_dict=True)
        samples = list(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn"))
        assert {tuple(sample["image"]) for sample in samples} == {(8, 8, 3)}
        found[source] = {sample["key"]: sample["label"] for sample in samples}
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[list[str]]:
    """A run, an export of it, and a server of that."""
    folder = tmp_path_factory.mktemp("labels")
    exported_run(folder, digits)
    exported = folder / "run/exports/v1"
    with label_server(exported) as server:
        yield [str(folder / "run"), str(exported), server.address]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a package `data`, as most have."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data/__init__.py").write_text('OWN = "the project\'s"\n')
    (folder / "read.py").write_text(READ)
    (folder / "train.py").write_text(TRAIN)
    return folder


def output(words: list[str], folder: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        words, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=HANGS_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected(sources: list[str]) -> dict[str, dict[str, int]]:
    """Key → label by source, from the export's own tables."""
    tables = [pq.read_table(path) for path in sorted(Path(sources[1], "labels").glob("*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    labels = {row["__key__"]: row["label"] for row in rows}
    return {source: dict(labels) for source in sources}


@pytest.mark.slow
def test_a_project_with_a_folder_data_reads_labels_in_spawned_workers(sources: list[str], project: Path) -> None:
    found = output([sys.executable, "train.py", *sources[:1]], project, PYTHONPATH=str(ROOT))
    assert json.loads(found) == {sources[0]: expected(sources)[sources[0]]}


@pytest.mark.slow
def test_the_wheel_alone_reads_labels_without_torch_and_trains_beside_it(
    sources: list[str], project: Path, tmp_path: Path
) -> None:
    """Installs from the package index that pip is configured for."""
    python = install_wheel(tmp_path)
    installed = {
        row["name"].lower() for row in json.loads(output([python, "-m", "pip", "list", "--format=json"], project))
    }
    assert "noisy-student-pipeline" in installed
    assert not installed & HEAVY
    assert json.loads(output([python, "read.py", *sources], project)) == expected(sources)
    refused = subprocess.run(
        [python, "-P", "-m", "pipeline.run", "--help"], cwd=project, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert (
        refused.stderr
        == "error: " + "the pipeline needs more than is installed: pip install 'noisy-student-pipeline[train]'\n"
    )
    # torch from these tests' environment, as its download is large; the project and its other packages are the wheel's
    site = Path(output([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], project).strip())
    (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert json.loads(output([python, "train.py", *sources], project)) == expected(sources)


def install_wheel(folder: Path) -> str:
    """Build the wheel, and install it with what it declares into an empty environment; the path of its python."""
    source = folder / "source"
    for package in ("pipeline", "teacher", "student", "data", "noisy_student"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    output([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)], source)
    (wheel,) = folder.glob("*.whl")
    output([sys.executable, "-m", "venv", str(folder / "bare")], folder)
    python = str(folder / "bare/bin/python")
    constraints = str(ROOT / "constraints.txt")
    output([python, "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel)], folder)
    return python


def test_data_imports_itself_relatively() -> None:
    """An absolute import of `data` would find the other project's, or load a module twice."""
    absolute = [
        f"{path.relative_to(ROOT)}:{line}" for path in (ROOT / "data").rglob("*.py") for line in imports_of_data(path)
    ]
    assert absolute == []


def imports_of_data(path: Path) -> list[int]:
    """Lines with an absolute import of `data`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    froms = [
        n.lineno
        for n in nodes
        if isinstance(n, ast.ImportFrom) and not n.level and (n.module or "").split(".")[0] == "data"
    ]
    plain = [
        n.lineno for n in nodes if isinstance(n, ast.Import) for name in n.names if name.name.split(".")[0] == "data"
    ]
    return froms + plain
