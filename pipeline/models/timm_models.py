"""Any timm model, with dropout and stochastic depth that it must really apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import DropPath
from torch import nn

from pipeline.models.resnet_rs import ModelError


def build_timm_model(
    name: str, num_classes: int, args: Mapping[str, Any], dropout: float, stochastic_depth: float
) -> nn.Module:
    """A timm model with fresh weights; see `pipeline.models.registry.build_model`.

    Raises ModelError when timm's model does not take an argument, or ignores a rate.
    """
    noise = {"drop_rate": dropout, "drop_path_rate": stochastic_depth}
    # a rate of 0 is left out: some timm models take only one of the two
    all_args = dict(args) | {key: rate for key, rate in noise.items() if rate}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **all_args)
    except TypeError as error:
        raise ModelError(
            f"{name} does not take one of {', '.join(all_args)} ({error}); set it to 0 or leave it out of model_args"
        ) from error
    _require_noise(model, name, dropout, stochastic_depth)
    return model


def _require_noise(model: nn.Module, name: str, dropout: float, stochastic_depth: float) -> None:
    """Raise ModelError for a model that takes a rate and ignores it: it would silently train without noise."""
    modules = list(model.modules())
    drops_paths = any(isinstance(module, DropPath) and module.drop_prob for module in modules)
    if stochastic_depth and not drops_paths:
        raise ModelError(f"stochastic_depth={stochastic_depth}: timm's {name} has no place for it; set it to 0")
    drops = any(isinstance(module, nn.Dropout) and module.p == dropout for module in modules)
    if dropout and not drops and not any(getattr(module, "drop_rate", None) == dropout for module in modules):
        raise ModelError(f"dropout={dropout}: timm's {name} has no place for it; set it to 0")
