"""Cross-entropy against dense targets: the objective of teacher and student."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.training.objectives.interface import MicroBatch, Terms


def classify(network: nn.Module, batch: MicroBatch) -> Terms:
    """The objective: `soft_cross_entropy` of the network's logits and the targets; nothing is logged beside it."""
    assert batch.targets is not None, "streams of this objective have targets"
    return Terms(soft_cross_entropy(network(batch.images), batch.targets), {})


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean of −Σ targets · log softmax(logits), in float32 also under autocast.

    The mean is over all samples alike, labeled and pseudo-labeled. Noisy Student's code adds the two parts' means,
    which with SGD also multiplies the learning rate (RECIPES.md).

    Args:
        logits: (N, C).
        targets: (N, C), rows sum to one.

    Returns:
        float32, a scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        losses = -(targets.float() * logits.float().log_softmax(1)).sum(1)
    return losses.mean()
