"""Checkpoints: everything to continue a training run at the next step. Tensors and plain values only; never pickled code."""

from __future__ import annotations

import io
import logging
import pickle
import re
import zipfile
from typing import Any

import torch

from data import storage

_NAME = re.compile(r"step-(\d{9})\.pt")

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """There are checkpoints, and none of them can be read."""


def save_checkpoint(folder: str, step: int, content: dict[str, Any], keep: int = 2, best: int | None = None) -> None:
    """Write `step-<step>.pt` atomically, then drop all but the newest `keep` up to it and that of step `best`.

    Later ones are there only if they were damaged and the training went back: they are dropped, too.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write_bytes(storage.join(folder, _name(step)), buffer.getvalue())
    names = _names(folder)
    kept = {*names[: names.index(_name(step)) + 1][-keep:], *([_name(best)] if best is not None else [])}
    for name in names:
        if name not in kept:
            storage.remove(storage.join(folder, name))


def load_newest(folder: str) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None without any. A damaged one is skipped with a warning.

    Raises:
        CheckpointError: there are some, but all are damaged: starting over by itself would throw a training away.
    """
    names = _names(folder)
    for name in reversed(names):
        url = storage.join(folder, name)
        try:
            return _load(storage.read_bytes(url))
        except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            logger.warning("%s is damaged (%s); continuing from the one before", url, _reason(error))
    if names:
        raise CheckpointError(f"{folder}: none of the {len(names)} checkpoints can be read; delete them to start over")
    return None


def _load(content: bytes) -> dict[str, Any]:
    """torch itself does not compare the checksums that it writes."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to run what is in there
        return "it holds more than tensors and plain values"
    return str(error).partition("\n")[0]


def _name(step: int) -> str:
    return f"step-{step:09d}.pt"


def _names(folder: str) -> list[str]:
    return [name for name in storage.list_names(folder) if _NAME.fullmatch(name)]
