"""What only a GPU can show: its tests, labeling and training throughput beside timm's, memory, torch.compile.

    python -m benchmarks.gpu [parts=tests,label,train,compile] [models=resnetrs50,resnetrs152] [workers=16] [out=runs/benchmark_gpu]
    python -m benchmarks.gpu device=cpu small=true     # the same in seconds on any CPU, to see that it runs

For a bare machine with torch, timm, torchvision, numpy and pyarrow: it says which other wheels to bring, and needs no Ray. A call
starts no measurement after `limit_s` seconds; the same command continues, and tries again what failed. Results are kept in
`out/results.json` and printed as JSON in the last line.

    tests    pytest -m cuda
    label    images/s of ShardLabeler in this process, 1,000 classes, JPEG photos of 500 × 375: model (images on the device), device
             (images in host memory), host (a model that costs nothing), together
    train    images/s of fit() and of timm's loop (amp, channels_last, compile), on one batch and on photos; peak memory, counted memory
    compile  fit() with and without torch.compile: rate, graphs, graph breaks
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.needs import missing, remedy
from data.settings import UsageError, run_command

PARTS = ("tests", "label", "train", "compile")


def bench(
    parts: str = ",".join(PARTS),
    models: str = "resnetrs50,resnetrs152",
    device: str = "cuda",
    small: bool = False,
    workers: int = 16,
    limit_s: float = 420.0,
    out: str = "runs/benchmark_gpu",
) -> None:
    """Measure what is not in `out/results.json` yet; see the module docstring.

    Raises:
        UsageError: unknown parts or models, no such device, or libraries are missing.
    """
    wanted = parts.split(",")
    if not set(wanted) <= set(PARTS):
        raise UsageError(f"parts={parts}: expected some of {', '.join(PARTS)}")
    if absent := missing("tests" in wanted):
        raise UsageError(remedy(absent))
    cells = _cells(wanted, device, small, models, workers, out)
    results, started = _Results(Path(out) / "results.json", device, small), time.monotonic()
    for name, measure in cells.items():
        if name in results.cells:
            continue
        if time.monotonic() - started > limit_s:
            print(f"{limit_s:.0f} s are over; the same command continues with {name}")
            break
        try:
            results.add(name, measure())
        except RuntimeError as error:  # the GPU's memory, the compiler: the others are measured all the same
            results.add_failure(name, f"{type(error).__name__}: {error}")
    print(json.dumps(results.record()))


def _cells(
    parts: list[str], device: str, small: bool, models: str, workers: int, out: str
) -> dict[str, Callable[[], dict[str, Any]]]:
    from benchmarks.gpu import label, train  # these need the libraries
    from benchmarks.gpu.setting import setting_of

    setting = setting_of(device, small, models, workers, out)
    of_part = {
        "tests": lambda: {"tests": run_tests},
        "label": lambda: label.cells(setting),
        "train": lambda: train.cells(setting),
        "compile": lambda: train.compile_cells(setting),
    }
    return {name: cell for part in parts for name, cell in of_part[part]().items()}


def run_tests() -> dict[str, Any]:
    """Run the tests that need a GPU, which share no fixtures with the others. Warnings of that machine's versions are no failures.

    Raises RuntimeError when one fails.
    """
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-W", "default", "-m", "cuda", "tests/cuda"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines() or ended.stderr.strip().splitlines() or [""]
    if ended.returncode:
        print(ended.stdout[-5000:], ended.stderr[-2000:])
        raise RuntimeError(f"pytest -m cuda: {lines[-1]}")
    return {"passed": True, "summary": lines[-1]}


class _Results:
    """Finished measurements of one device, in a file."""

    def __init__(self, path: Path, device: str, small: bool) -> None:
        import torch

        self._path = path
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self._about = {"bench": "gpu", "device": name, "torch": torch.__version__, "small": small}
        found = json.loads(path.read_text()) if path.exists() else {}
        same = {key: found.get(key) for key in self._about} == self._about
        self.cells: dict[str, dict[str, Any]] = found["cells"] if same else {}
        self._failed: dict[str, str] = {}

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep and print a measurement."""
        self.cells[name] = {
            key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()
        }
        print(f"{name}: {self.cells[name]}", flush=True)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def add_failure(self, name: str, reason: str) -> None:
        """Print why a measurement failed, and put it into the record. The next call tries it again."""
        print(f"{name} failed: {reason}", flush=True)
        self._failed[name] = reason.partition("\n")[0]

    def record(self) -> dict[str, Any]:
        """All of it, as one JSON object."""
        return {**self._about, "cells": self.cells} | ({"failed": self._failed} if self._failed else {})


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
