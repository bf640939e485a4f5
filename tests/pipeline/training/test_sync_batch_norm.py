"""Batch norms with statistics of all ranks compute the same as plain ones: activations inside norm layers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import set_bn_momentum
from pipeline.training.distributed import share_statistics

SMALL_RESNET_RS = {"width": 0.125, "blocks": [1, 1, 1, 1]}
FAMILIES = {  # the smallest model of each, and an image size that it takes
    "resnetrs26": 32, "efficientnet_b0": 32, "tf_efficientnet_lite0": 32, "mobilenetv3_small_100": 32, "resnet18": 32,
    "regnety_002": 32, "densenet121": 32, "dla34": 64, "ghostnet_100": 32, "convnext_atto": 32, "vit_tiny_patch16_224": 224,
    "mixnet_s": 32, "repvgg_a0": 32, "levit_128s": 224,
}  # fmt: skip


def model_with_statistics(name: str) -> nn.Module:
    """Fresh weights; random statistics, gains and offsets, so that no norm and no activation is the identity."""
    torch.manual_seed(0)
    model = build_model(name, 7, SMALL_RESNET_RS if name == "resnetrs26" else {})
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model.eval()


@pytest.mark.parametrize(("name", "size"), FAMILIES.items(), ids=FAMILIES)
def test_a_model_computes_the_same_with_shared_statistics(name: str, size: int) -> None:
    """With torch's converter, outputs of efficientnet_b0 differ by 70."""
    model, images = model_with_statistics(name), torch.rand(2, 3, size, size)
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        before = model(images)
        converted = share_statistics(copy.deepcopy(model))
        after = converted(images)
    assert torch.equal(before, after)
    assert list(converted.state_dict()) == list(model.state_dict())
    norms = [module for module in converted.modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    in_place = share_statistics(model)
    assert all(one is two for one, two in zip([*in_place.parameters(), *in_place.buffers()], tensors, strict=True))


def test_shared_statistics_keep_the_momentum_and_what_is_frozen() -> None:
    model = build_model("efficientnet_b0", 7, {})
    set_bn_momentum(model, 1.0)
    model.train()
    first = next(module for module in model.modules() if isinstance(module, _BatchNorm))
    first.eval()
    first.requires_grad_(False)
    norms = [module for module in share_statistics(model).modules() if isinstance(module, _BatchNorm)]
    assert {module.momentum for module in norms} == {1.0}
    assert [module.training for module in norms] == [False, *[True] * (len(norms) - 1)]
    assert not norms[0].weight.requires_grad
    assert norms[1].weight.requires_grad
