"""Output folders of benchmarks: emptied before writing, if a benchmark made them; how long writing takes."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from data.settings import UsageError


def fresh_folder(path: str | Path) -> Path:
    """Return an empty folder. An existing one is emptied if the marker file beside it says that a benchmark made it.

    Raises:
        UsageError: the folder has content and no marker.
    """
    folder, marker = Path(path), _marker(path)
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} has content that no benchmark made; set another out=, or remove it")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    return folder


def remove_folder(path: str | Path) -> None:
    """Remove a folder of `fresh_folder` and its marker."""
    shutil.rmtree(path)
    _marker(path).unlink()


def seconds_to_disk(run: Callable[[Path], None], folder: Path) -> float:
    """Return the seconds until all that `run` writes into an emptied folder is on disk."""
    fresh_folder(folder)
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    run(folder)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - started


def _marker(path: str | Path) -> Path:
    whole = Path(path).absolute()
    return whole.with_name(f".{whole.name}.benchmark")
