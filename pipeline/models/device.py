"""Whether the device that a configuration names is there."""

from __future__ import annotations

import torch

from data.settings import UsageError


def require_device(device: str) -> None:
    """Raises UsageError for a GPU that this process does not have."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: torch finds no GPU here; check the driver, or give device=cpu")
