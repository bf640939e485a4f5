"""The benchmark for a GPU, in its small form on a CPU: it runs where Ray is not installed, continues, and names what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import label, needs
from benchmarks.gpu.setting import setting_of
from data.settings import UsageError
from pipeline.inference.predictor import Predictor
from tests import HANGS_S

WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from benchmarks.gpu.__main__ import bench; bench({arguments})"
CELLS = {
    "label resnetrs26@64": {"model", "device", "host", "together", "together_of_slower_path"},
    "train resnetrs26@64 ours, one batch": {"img_per_s", "counted_gb"},
    "train resnetrs26@64 timm, one batch": {"img_per_s"},
    "train resnetrs26@64 ours, photos": {"img_per_s", "counted_gb"},
    "train resnetrs26@64 timm, photos": {"img_per_s"},
    "compile resnetrs26@64 off": {"img_per_s", "graphs", "graph_breaks"},
}


def run(folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    code = WITHOUT_RAY.format(arguments=f"device='cpu', small=True, out={str(folder)!r}, {arguments}")
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS_S, check=False)


@pytest.mark.slow
def test_it_measures_every_cell_without_ray_and_continues(tmp_path: Path) -> None:
    parts = "label,train,compile"
    begun = run(tmp_path, parts=parts, limit_s=0.0)
    assert begun.returncode == 0, begun.stderr
    assert "the same command continues with label resnetrs26@64" in begun.stdout
    done = run(tmp_path, parts=parts)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert {name: set(cell) for name, cell in record["cells"].items()} == CELLS
    assert all(
        value > 0 for cell in record["cells"].values() for name, value in cell.items() if not name.startswith("graph")
    )
    again = run(tmp_path, parts=parts)
    assert again.stdout.splitlines() == [done.stdout.splitlines()[-1]]  # nothing is measured twice


def test_a_measurement_that_fails_leaves_the_others_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory() -> dict[str, float]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")

    cells = {"large": out_of_memory, "small": lambda: {"img_per_s": 2.0}}
    monkeypatch.setattr(gpu, "_cells", lambda *_: cells)
    gpu.bench(parts="train", device="cpu", out=str(tmp_path))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cells"] == {"small": {"img_per_s": 2.0}}
    assert record["failed"] == {"large": "OutOfMemoryError: CUDA out of memory."}
    cells["large"] = lambda: {"img_per_s": 1.0}
    gpu.bench(parts="train", device="cpu", out=str(tmp_path))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(record["cells"]) == {"large", "small"}
    assert "failed" not in record


def test_failed_tests_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = iter([(1, "1 failed, 3 passed in 2s"), (0, "4 passed in 2s")])
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, *next(ends), "")
    )
    gpu.bench(parts="tests", device="cpu", small=True, out=str(tmp_path))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cells"] == {}
    assert record["failed"] == {"tests": "RuntimeError: pytest -m cuda: 1 failed, 3 passed in 2s"}
    gpu.bench(parts="tests", device="cpu", small=True, out=str(tmp_path))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["cells"] == {"tests": {"passed": True, "summary": "4 passed in 2s"}}
    assert "failed" not in record


@pytest.mark.slow
def test_all_tests_that_need_a_gpu_are_run_and_need_nothing_that_a_bare_machine_lacks() -> None:
    """In their folder, without conftest.py, and with pytest's own plugins alone."""
    tests = Path(__file__).parent.parent
    marked = {path.parent.name for path in tests.rglob("*.py") if f"mark.{'cuda'}" in path.read_text()}
    assert marked == {"cuda"}
    code = (
        "import sys, pytest; sys.modules |= dict.fromkeys(['ray', 'hypothesis', 'sklearn', 'tests.conftest', 'torchmetrics']); "
        "sys.exit(pytest.main(['--noconftest', '-q', '--collect-only', '-p', 'pytest_timeout', '-m', 'cuda', 'tests/cuda']))"
    )
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS_S, check=False, cwd=tests.parent,
        env=environment,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    collected = [line for line in found.stdout.splitlines() if "::" in line]
    assert len(collected) >= 15, found.stdout
    assert all("[cuda" in line or "-cuda" in line for line in collected)


def test_the_model_of_the_host_path_leaves_normalization_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "_prepared", lambda *_: pytest.fail("the host normalizes"))
    setting = setting_of("cpu", True, "", 1, str(tmp_path))
    assert label._labeling(label._free(setting, setting.models[0]), setting) > 0


def test_what_is_missing_is_one_line_with_the_wheels_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None if name in ("pydantic", "pytest") else object())
    with pytest.raises(
        UsageError, match=r"^missing here: pydantic pytest; .*pip download .* pydantic pytest; then"
    ) as caught:
        gpu.bench(out=str(tmp_path))
    assert "\n" not in str(caught.value)
    assert needs.missing(tests=False) == ["pydantic"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "labels"}, "parts=labels: expected some of tests, label"),
        ({"device": "cuda"}, "torch finds no GPU here"),
    ],
)
def test_bad_arguments_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        gpu.bench(out=str(tmp_path), **options)  # type: ignore[arg-type]
