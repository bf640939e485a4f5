"""The networks of self-supervised pretraining: a backbone with a head that is dropped in the end."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from pipeline.core.schema import PretrainConfig, TrainConfig
from pipeline.models.registry import build_model, on_meta
from pipeline.models.resnet_rs import ModelError


class PretrainingNetwork(nn.Module):
    """backbone ──► features ──► projector ──► projections [──► predictor ──► predictions, of BYOL]."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.projector, self.predictor = backbone, projector, predictor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images, float32 (N, 3, S, S) → projections or predictions (N, D)."""
        projections = self.project(images)
        return projections if self.predictor is None else self.predictor(projections)

    def project(self, images: torch.Tensor) -> torch.Tensor:
        """Normalized images, float32 (N, 3, S, S) → projections (N, D)."""
        projections: torch.Tensor = self.projector(self.backbone(images))
        return projections

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the backbone's activations again in the backward pass; under timm's name for it."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]  # timm's interface


def pretraining_network(config: PretrainConfig) -> PretrainingNetwork:
    """The model of a configuration with the head of its objective, with fresh weights.

    Raises ModelError: no such model, or it gives no vector of features.
    """
    backbone = build_model(config.model, 0, config.model_args, config.dropout, config.stochastic_depth)
    features, outputs = num_features(config), config.projection_dim
    hidden = config.projection_hidden or features
    if config.objective == "byol":
        projector, predictor = _mlp(features, hidden, outputs), _mlp(outputs, hidden, outputs)
        return PretrainingNetwork(backbone, projector, predictor)
    layers = 2 if config.objective == "simclr" else 3
    return PretrainingNetwork(backbone, _contrastive_head(features, hidden, outputs, layers), None)


def num_features(config: TrainConfig) -> int:
    """Length of the vector that a model gives to its classifier. Raises ModelError when that is no vector."""
    backbone = on_meta(partial(build_model, config.model, 0, config.model_args)).eval()
    shape = backbone(torch.zeros(1, *config.view_shape, device="meta")).shape
    if len(shape) != 2:
        raise ModelError(
            f"model {config.model!r}: its features have shape {tuple(shape[1:])}, expected one vector an image"
        )
    return int(shape[1])


def _contrastive_head(inputs: int, hidden: int, outputs: int, layers: int) -> nn.Sequential:
    """SimCLR's head (released code): each layer has a batch norm in place of a bias; the last one has no shift and no ReLU."""
    widths = [inputs] + [hidden] * (layers - 1)
    modules: list[nn.Module] = []
    for width in widths[:-1]:
        modules += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
    last = nn.BatchNorm1d(outputs)
    last.bias.requires_grad_(False)
    return nn.Sequential(*modules, nn.Linear(widths[-1], outputs, bias=False), last)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """BYOL's projector and predictor: a hidden layer with batch norm, and a linear one without (section 3.3)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
    )
