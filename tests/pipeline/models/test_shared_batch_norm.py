"""Batch norms with statistics of all processes compute what one process computes that has all images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import set_bn_momentum
from pipeline.models.shared_batch_norm import SharedBatchNorm, SharedBatchNormAct, share_statistics
from tests.training_processes import in_group

SMALL_RESNET_RS = {"width": 0.125, "blocks": [1, 1, 1, 1]}
FAMILIES = {  # the smallest model of each, and an image size that it takes
    "resnetrs26": 32, "efficientnet_b0": 32, "tf_efficientnet_lite0": 32, "mobilenetv3_small_100": 32, "resnet18": 32,
    "regnety_002": 32, "densenet121": 32, "dla34": 64, "ghostnet_100": 32, "convnext_atto": 32, "vit_tiny_patch16_224": 224,
    "mixnet_s": 32, "repvgg_a0": 32, "levit_128s": 224,
}  # fmt: skip
CHANNELS = 5
LAYERS = {
    "torch's": (lambda: nn.BatchNorm2d(CHANNELS), (4, 3)),
    "timm's, activated": (lambda: BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), (4, 3)),
    "of vectors": (lambda: nn.BatchNorm1d(CHANNELS), ()),
    "of sequences": (lambda: nn.BatchNorm1d(CHANNELS), (6,)),
    "without weights": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (4, 3)),
    "without running statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (4, 3)),
}
SHARES = {"equal": (3, 3), "unequal": (5, 2)}  # images of each process
Numbers = dict[str, np.ndarray]


def layer_of(kind: str) -> nn.Module:
    """Its gains, offsets and running statistics are not those that it begins with."""
    torch.manual_seed(1)
    layer = LAYERS[kind][0]().double()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return layer


def forward_and_backward(kind: str, images: int, rows: slice, shared: bool) -> Numbers:
    """Two steps of a layer in float64 with `rows` of each batch."""
    layer = layer_of(kind)
    if shared:
        share_statistics(layer)
    torch.manual_seed(2)
    found: Numbers = {}
    for step in range(2):
        batch = (
            torch.randn(images, CHANNELS, *LAYERS[kind][1], dtype=torch.float64) * 3 + 1000
        )  # sums of squares cancel
        slopes = torch.randn_like(batch)
        x = batch[rows].clone().requires_grad_()
        output = layer(x)
        (output * slopes[rows]).sum().backward()
        assert x.grad is not None
        found |= {f"output {step}": output.detach().numpy(), f"gradient {step}": x.grad.numpy()}
    gradients = {
        f"{name}.grad": value.grad.numpy() for name, value in layer.named_parameters() if value.grad is not None
    }
    return found | gradients | {name: value.numpy() for name, value in layer.named_buffers()}


def parts_of_all(rank: int) -> dict[tuple[str, str], Numbers]:
    found = {}
    for kind in LAYERS:
        for name, (first, second) in SHARES.items():
            rows = slice(first) if rank == 0 else slice(first, None)
            found[kind, name] = forward_and_backward(kind, first + second, rows, shared=True)
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Numbers]]:
    """What each of two processes computes with its share of a batch."""
    return in_group(tmp_path_factory.mktemp("group") / "meeting", parts_of_all)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("kind", LAYERS)
def test_two_processes_compute_what_one_does_with_the_whole_batch(
    parts: list[dict[tuple[str, str], Numbers]], kind: str, shares: str
) -> None:
    whole = forward_and_backward(kind, sum(SHARES[shares]), slice(None), shared=False)
    first, second = (part[kind, shares] for part in parts)
    assert first.keys() == second.keys() == whole.keys()
    for name, expected in whole.items():
        if name.startswith(("output", "gradient")):
            found = np.concatenate([first[name], second[name]])
        elif name.endswith(".grad"):  # DDP adds them
            found = first[name] + second[name]
        else:
            assert np.array_equal(first[name], second[name]), name
            found = first[name]
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10, err_msg=name)


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


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("name", "size"), FAMILIES.items(), ids=FAMILIES)
def test_a_model_computes_the_same_with_shared_statistics(name: str, size: int) -> None:
    """Without the activations inside norm layers, outputs of efficientnet_b0 differ by 70."""
    model, images = model_with_statistics(name).double(), torch.rand(4, 3, size, size, dtype=torch.float64)
    shared = copy.deepcopy(model)
    tensors = [*shared.parameters(), *shared.buffers()]
    share_statistics(shared)
    with torch.no_grad():
        assert torch.equal(shared(images), model(images))
        trained = []
        for network in (shared, model):
            torch.manual_seed(1)  # some of timm's models have dropout
            trained.append(network.train()(images))
        torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-6)
    for (key, found), (expected_key, expected) in zip(
        shared.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert key == expected_key
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(one is two for one, two in zip([*shared.parameters(), *shared.buffers()], tensors, strict=True))
    norms = [module for module in shared.modules() if isinstance(module, _BatchNorm)]
    assert all(isinstance(module, SharedBatchNorm) for module in norms)


def test_shared_statistics_keep_the_momentum_hooks_and_what_is_frozen() -> None:
    model = build_model("efficientnet_b0", 7, {})
    set_bn_momentum(model, 1.0)
    model.train()
    first = next(module for module in model.modules() if isinstance(module, _BatchNorm))
    first.eval()
    first.requires_grad_(False)
    first.register_forward_pre_hook(lambda *_: None)
    share_statistics(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert {type(module) for module in norms} == {SharedBatchNormAct}
    assert {module.momentum for module in norms} == {1.0}
    assert [module.training for module in norms] == [False, *[True] * (len(norms) - 1)]
    assert len(norms[0]._forward_pre_hooks) == 1
    assert not norms[0].weight.requires_grad
    assert norms[1].weight.requires_grad
