"""Fold each batch norm into the convolution before it: the same function with fewer passes over memory, for inference only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

_Convolution = nn.Conv2d | nn.Conv3d
_Norm = nn.BatchNorm2d | nn.BatchNorm3d
_CONVOLUTIONS, _NORMS = (nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)
_TOLERANCE = 1e-3  # of the largest output; folding itself rounds by about 1e-6


def fold_batch_norm(model: nn.Module, view_shape: Sequence[int]) -> nn.Module:
    """A copy of `model` in eval mode with every batch norm that directly follows a convolution folded into it.

    One forward pass of noise, (1, *view_shape), finds the pairs. If the folded copy's output differs, as it does where
    a convolution's output has a second user, return `model` itself.
    """
    model = model.eval()
    folded = copy.deepcopy(model)
    example = torch.randn(1, *view_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(example)
    for convolution, norm in _pairs(folded, example):
        _fold(convolution, norm)
        _replace(folded, norm)
    with torch.inference_mode():
        difference = (folded(example) - expected).abs().max()
    return folded if difference <= _TOLERANCE * expected.abs().max() else model


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[_Convolution, _Norm]]:
    """Each batch norm whose input is a convolution's output; modules used more than once are left out."""
    outputs: dict[int, tuple[_Convolution, Tensor]] = {}  # holds the tensors, so that no id is reused
    pairs: list[tuple[_Convolution, _Norm]] = []
    uses: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, _CONVOLUTIONS)
        uses[module] += 1
        outputs[id(output)] = module, output

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _NORMS)
        uses[module] += 1
        if id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], module))

    hooks = [m.register_forward_hook(after_convolution) for m in model.modules() if isinstance(m, _CONVOLUTIONS)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in model.modules() if isinstance(m, _NORMS)]
    with torch.inference_mode():
        model(example)
    for hook in hooks:
        hook.remove()
    return [(convolution, norm) for convolution, norm in pairs if uses[convolution] == uses[norm] == 1]


def _fold(convolution: _Convolution, norm: _Norm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


def _replace(model: nn.Module, norm: _Norm) -> None:
    """Replace a folded batch norm by its rest: timm's batch norms contain dropout and an activation."""
    name = next(name for name, module in model.named_modules() if module is norm)
    parent, _, leaf = name.rpartition(".")
    rest = [module for part in ("drop", "act") if isinstance(module := getattr(norm, part, None), nn.Module)]
    setattr(model.get_submodule(parent), leaf, nn.Sequential(*rest) if rest else nn.Identity())
