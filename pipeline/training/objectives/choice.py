"""Which objective a training has: its configuration says."""

from __future__ import annotations

from typing import cast

from torch import nn

from pipeline.core.schema import PretrainConfig, TrainConfig
from pipeline.training.distributed import Ranks
from pipeline.training.objectives.byol import bootstrap
from pipeline.training.objectives.contrastive import contrast
from pipeline.training.objectives.cross_entropy import classify
from pipeline.training.objectives.interface import Objective
from pipeline.training.objectives.networks import PretrainingNetwork


def objective_of(config: TrainConfig, model: nn.Module, average: nn.Module, ranks: Ranks) -> Objective:
    """The objective of a training.

    Args:
        model: `build_network` of the configuration, in training, without wrappers.
        average: the moving average of its weights.
    """
    if not isinstance(config, PretrainConfig):
        return classify
    if config.objective == "byol":
        return bootstrap(cast(PretrainingNetwork, model), cast(PretrainingNetwork, average), ranks)
    return contrast(config.temperature, ranks)
