"""The objective: cross-entropy against dense targets, on mixed images if configured (`mixup`)."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from pipeline.inputs.pixel_ops import upload


class Mixing(NamedTuple):
    """What each image of a batch is mixed with.

    Attributes:
        partners: the row of another image, int64 (N,).
        weight: of the image itself, float32 (N,), 0.5 to 1; the partner has the rest.
    """

    partners: torch.Tensor
    weight: torch.Tensor


def draw_mixing(num_images: int, alpha: float, device: torch.device) -> Mixing:
    """Draw a partner and a weight for each image of a batch: mixup (arXiv 1710.09412).

    The weight is drawn per image from Beta(alpha, alpha); the image itself has the larger part.
    """
    drawn = _beta(alpha).sample((num_images,))
    weight = torch.maximum(drawn, 1 - drawn)
    partners, weight = upload(torch.stack([torch.randperm(num_images).double(), weight.double()]), device)
    return Mixing(partners.long(), weight.float())


@lru_cache(maxsize=8)
def _beta(alpha: float) -> torch.distributions.Beta:
    return torch.distributions.Beta(alpha, alpha)


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
