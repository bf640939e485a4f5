"""Counts what a model's device is sent and asked, and a model that labels, for tests on GPUs and without."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.inference.ensemble import Ensemble
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing

SIZE, CLASSES, BATCH = 8, 20, 6
FROM_PYTHON = "aten.lift_fresh.default"  # a tensor from Python's or NumPy's values
ASKS = "aten._local_scalar_dense.default"  # the value of one number, for which a device would be waited for


class Linear(torch.nn.Module):
    """A classifier of `CLASSES` classes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) → (N, C)."""
        return self.layer(batch.flatten(1))


class Operations(TorchDispatchMode):
    """Counts operations, and copies from one device to another as `cpu→meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[str(func)] += 1
        if isinstance(result, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            before, after = args[0].device.type, result.device.type
            self.count[f"{before}→{after}"] += before != after
        return result


def ensemble(device: str, views: int = 4, members: int = 3, temperature: float = 0.7) -> Ensemble:
    """Several models on several views, with random weights."""
    preprocessing = Preprocessing(SIZE, 1.0, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    models = (Predictor(Linear(seed), preprocessing, device, BATCH, 1.5, views) for seed in range(members))
    return Ensemble(list(models), temperature)


def pixels(number: int) -> np.ndarray:
    """`number` random images, uint8 (N, S, S, 3)."""
    return np.random.default_rng(number).integers(0, 256, (number, SIZE, SIZE, 3), np.uint8)
