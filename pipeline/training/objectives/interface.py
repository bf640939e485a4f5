"""What an objective is: a function of the network and a micro-batch that returns a loss, and what to log beside it.

The training loop knows nothing else of it: batches, accumulation, ranks, checkpoints and logs are the same for every objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn


class MicroBatch(NamedTuple):
    """What an objective sees of a step's images on one rank.

    Attributes:
        images: normalized, float32 (M · k, 3, S, S) for M images of k views each; row i · k + v is view v of image i.
        targets: float32 (M, C); None where no labels are needed.
    """

    images: torch.Tensor
    targets: torch.Tensor | None


class Terms(NamedTuple):
    """What a step gives to the log: scalars on the device.

    Attributes:
        loss: the mean over the images, float32.
        metrics: by name, float32, without gradients; the log has their means over steps and ranks.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


Objective = Callable[[nn.Module, MicroBatch], Terms]
"""Called under autocast, with the network as `training_network` returns it; the loss has gradients."""
