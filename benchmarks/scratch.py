"""Folders that benchmarks empty before they write: only those that a benchmark made."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.settings import UsageError


def fresh_folder(path: str | Path) -> Path:
    """An empty folder. One that is there is removed, if a marker beside it says that a benchmark made it.

    Raises:
        UsageError: a folder with content that no benchmark made.
    """
    folder, marker = Path(path), _marker(path)
    if folder.exists() and not marker.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} would be emptied, and no benchmark made it; give another out=, or remove it by hand"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    return folder


def remove_folder(path: str | Path) -> None:
    """Remove what `fresh_folder` made."""
    shutil.rmtree(path)
    _marker(path).unlink()


def _marker(path: str | Path) -> Path:
    whole = Path(path).absolute()
    return whole.with_name(f".{whole.name}.benchmark")
