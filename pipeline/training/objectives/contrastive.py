"""SimCLR's objective: the two views of an image attract each other, and repel those of all other images of the batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from pipeline.training.distributed import Ranks
from pipeline.training.objectives.interface import MicroBatch, Objective, Terms


def contrast(temperature: float, ranks: Ranks) -> Objective:
    """The objective: `nt_xent` over the images of all ranks. Every rank computes the loss of the whole batch (`Ranks.gather_rows`)."""

    def objective(network: nn.Module, batch: MicroBatch) -> Terms:
        projections = ranks.gather_rows(network(batch.images))
        return Terms(nt_xent(projections, temperature), {"spread": spread(projections)})

    return objective


def nt_xent(projections: torch.Tensor, temperature: float) -> torch.Tensor:
    """The normalized, temperature-scaled cross-entropy (SimCLR, arXiv 2002.05709, equation 1), in float32 also under autocast.

    For each of the 2N views: −log of exp(s / T) of its partner over the sum of exp(s / T) of all 2N − 1 others, where s is the cosine
    of two projections; the mean over the views.

    Args:
        projections: (2N, D); rows 2i and 2i + 1 are the views of image i.

    Returns:
        float32, a scalar.
    """
    with torch.autocast(projections.device.type, enabled=False):
        normalized = functional.normalize(projections.float(), dim=1)
        similarities = normalized @ normalized.T / temperature
        itself = torch.eye(len(similarities), dtype=torch.bool, device=similarities.device)
        return functional.cross_entropy(similarities.masked_fill(itself, -torch.inf), partners(projections))


def partners(views: torch.Tensor) -> torch.Tensor:
    """For each row of (2N, …), the row of the same image's other view: 1, 0, 3, 2, …; int64 (2N,)."""
    return torch.arange(len(views), device=views.device) ^ 1


@torch.no_grad()
def spread(features: torch.Tensor) -> torch.Tensor:
    """How far features are from being all the same: 0 collapsed, 1 spread evenly over the sphere.

    The standard deviation over the rows of the normalized features, averaged over dimensions, relative to 1 / √D (SimSiam,
    arXiv 2011.10566, section 4.1).

    Args:
        features: (N, D).

    Returns:
        float32, a scalar.
    """
    normalized = functional.normalize(features.detach().float(), dim=1)
    return normalized.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5
