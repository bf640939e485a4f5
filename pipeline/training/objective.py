"""The objective: cross-entropy against dense targets, on mixed images if configured (`mixup`)."""

from __future__ import annotations

import torch


def mix_images(images: torch.Tensor, targets: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix each image and its target with another one of the batch: mixup (arXiv 1710.09412).

    The coefficient is drawn per image from Beta(alpha, alpha); the image itself has the larger part.

    Args:
        images: float32 (N, 3, S, S).
        targets: float32 (N, C).
    """
    drawn = torch.distributions.Beta(alpha, alpha).sample((len(images),))
    weight = torch.maximum(drawn, 1 - drawn).to(images.device)
    other = torch.randperm(len(images)).to(images.device)
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    mixed = torch.lerp(images[other], images, weight.view(-1, 1, 1, 1))
    mixed = mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return mixed, torch.lerp(targets[other], targets, weight.view(-1, 1))


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
