"""Checkpoints: everything to continue a training run at the next step. Tensors and plain values only; never pickled code."""

from __future__ import annotations

import io
import logging
import pickle
import re
from typing import Any

import torch

from data import storage

_NAME = re.compile(r"step-(\d{9})\.pt")
_KEPT = 2

logger = logging.getLogger(__name__)


def save_checkpoint(folder: str, step: int, content: dict[str, Any]) -> None:
    """Write `step-<step>.pt` atomically, then drop all but the newest two."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write_bytes(storage.join(folder, f"step-{step:09d}.pt"), buffer.getvalue())
    for name in _names(folder)[:-_KEPT]:
        storage.remove(storage.join(folder, name))


def load_newest(folder: str) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None without one. A damaged one is skipped with a warning."""
    for name in reversed(_names(folder)):
        url = storage.join(folder, name)
        try:
            content = torch.load(io.BytesIO(storage.read_bytes(url)), map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            logger.warning("%s is damaged (%s); continuing from the one before", url, str(error).splitlines()[0])
            continue
        return dict(content)
    return None


def _names(folder: str) -> list[str]:
    return [name for name in storage.list_names(folder) if _NAME.fullmatch(name)]
