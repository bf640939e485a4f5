"""The loss: cross-entropy against dense targets."""

from __future__ import annotations

import torch


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean of −Σ targets · log softmax(logits), in float32 whatever autocast makes of the model.

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
