"""Network and objective of a training: its configuration decides both."""

from __future__ import annotations

from typing import cast

from torch import nn

from pipeline.core.schema import PretrainConfig, TrainConfig
from pipeline.models.registry import build_model
from pipeline.training.distributed import Ranks
from pipeline.training.objectives.byol import bootstrap
from pipeline.training.objectives.contrastive import contrast
from pipeline.training.objectives.cross_entropy import classify
from pipeline.training.objectives.interface import Objective
from pipeline.training.objectives.networks import PretrainingNetwork, pretraining_network


def build_network(config: TrainConfig, num_classes: int) -> nn.Module:
    """The network that a training of `config` trains, with fresh weights.

    Args:
        num_classes: of a classifier; a pretraining has none.

    Raises:
        ModelError: no such model, or for a pretraining it gives no vector of features.
    """
    if isinstance(config, PretrainConfig):
        return pretraining_network(config)
    return build_model(config.model, num_classes, config.model_args, config.dropout, config.stochastic_depth)


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
