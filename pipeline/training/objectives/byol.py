"""BYOL's objective (arXiv 2006.07733): predict the other view's projection by an averaged network. It has no negatives.

view 1 ──► network ──► projection ──► prediction ─┐
                                                  ├─► cosine
view 2 ──► average of the network ──► projection ─┘        and the other way round
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.shared_batch_norm import share_statistics
from pipeline.training.distributed import Ranks
from pipeline.training.objectives.contrastive import partners, spread
from pipeline.training.objectives.interface import MicroBatch, Objective, Terms
from pipeline.training.objectives.networks import PretrainingNetwork


def bootstrap(model: PretrainingNetwork, average: PretrainingNetwork, ranks: Ranks) -> Objective:
    """The objective.

    Args:
        model: the network in training, without wrappers.
        average: the moving average of its weights (the training's EMA), which gives the targets. With several ranks, its batch norms
            share their statistics from now on, as those of `model` do.
    """
    if ranks.world > 1:
        share_statistics(average)

    def objective(network: nn.Module, batch: MicroBatch) -> Terms:
        predictions = network(batch.images)
        with torch.no_grad(), _batch_statistics(model, average):
            targets = average.project(batch.images)
        return Terms(byol_loss(predictions, targets), {"spread": spread(ranks.gather_rows(targets))})

    return objective


def byol_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """2 − 2 · the cosine of a view's prediction and the other view's target, summed over both views of an image (equation 2).

    Args:
        predictions, targets: (2N, D); rows 2i and 2i + 1 are the views of image i.

    Returns:
        The mean over the N images: float32, a scalar, also under autocast.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        cosines = functional.cosine_similarity(predictions.float(), targets.float()[partners(targets)], dim=1)
        return 2 * (2 - 2 * cosines).mean()


@contextmanager
def _batch_statistics(model: nn.Module, average: nn.Module) -> Iterator[None]:
    """Inside, batch norms of `average` take the batch's statistics where those of `model` do, and leave their running ones alone."""
    training = {name for name, module in model.named_modules() if module.training}
    norms = [module for name, module in average.named_modules() if isinstance(module, _BatchNorm) and name in training]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True
