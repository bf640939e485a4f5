"""Mixup (arXiv 1710.09412): each image of a batch is mixed with another one, and so are their targets."""

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
    """Draw a partner and a weight for each image of a batch.

    The weight is drawn per image from Beta(alpha, alpha); the image itself has the larger part.
    """
    drawn = _beta(alpha).sample((num_images,))
    weight = torch.maximum(drawn, 1 - drawn)
    partners, weight = upload(torch.stack([torch.randperm(num_images).double(), weight.double()]), device)
    return Mixing(partners.long(), weight.float())


@lru_cache(maxsize=8)
def _beta(alpha: float) -> torch.distributions.Beta:
    return torch.distributions.Beta(alpha, alpha)
