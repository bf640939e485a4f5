"""The family against the published table and against timm's own implementation."""

import pytest
import timm
import torch
from torch import nn

from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta, timm_architecture
from pipeline.models.resnet_rs import (
    BLOCKS,
    Bottleneck,
    ModelError,
    ResNetRS,
    resnet_rs,
    set_bn_momentum,
    stage_drop_rates,
)

# depth, pixels, parameters in millions, FLOPs in billions: Table 12 and the released configurations (RECIPES: ResNet-RS)
PUBLISHED = [
    (50, 160, 35.7, 4.6), (101, 160, 63.7, 8.4), (101, 192, 63.7, 12), (152, 192, 86.8, 18), (152, 224, 86.8, 24),
    (152, 256, 86.8, 31), (200, 256, 93.4, 40), (270, 256, 130.1, 54), (350, 256, 164.3, 69), (350, 320, 164.3, 108),
    (420, 320, 191.9, 128),
]  # fmt: skip
TIMM_DEPTHS = (50, 101, 152, 200, 270, 350, 420)


@pytest.mark.parametrize(("depth", "pixels", "millions", "billions"), PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(depth: int, pixels: int, millions: float, billions: float) -> None:
    model = on_meta(lambda: resnet_rs(depth))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.003)
    # the table gives two digits for most rows, and counts a few operations besides convolutions
    assert count_flops(model, pixels) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("depth", TIMM_DEPTHS)
def test_names_and_shapes_are_timms(depth: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"resnetrs{depth}").state_dict()
    ours = on_meta(lambda: resnet_rs(depth)).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


def scramble(model: nn.Module) -> None:
    """Values that would show any difference: fresh models end each block in a zero gain."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            spread = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(spread + 0.5 if "running_var" in name or tensor.ndim == 1 else (spread - 0.5) * 0.1)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("resnetrs50", {}),
        ("resnetrs50", {"width": 0.25, "blocks": [1, 2, 4, 1]}),
        ("resnetrs26", {"width": 0.5}),
        ("resnetrs26", {"width": 0.25, "stem": 32}),
        ("resnetrs26", {"width": 0.25, "resnet_d": False, "se_ratio": 0.0}),
    ],
)
def test_weights_load_both_ways_and_give_the_same_outputs(name: str, args: dict[str, object]) -> None:
    ours = build_model(name, 10, args).eval()
    architecture, timm_args = timm_architecture(name, args)
    theirs = timm.create_model(architecture, num_classes=10, **timm_args).eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scramble(ours)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
        assert ours(images).std() > 0
    scramble(theirs)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_is_constant_in_a_stage_and_grows_by_fifths() -> None:
    assert stage_drop_rates(0.1) == pytest.approx((0.04, 0.06, 0.08, 0.1))
    model = resnet_rs(26, 10, width=0.125, stochastic_depth=0.5)
    for stage, expected in zip(
        (model.layer1, model.layer2, model.layer3, model.layer4), (0.2, 0.3, 0.4, 0.5), strict=True
    ):
        assert isinstance(stage, nn.Sequential)
        rates = [
            block.drop_path.p if isinstance(block, Bottleneck) and hasattr(block.drop_path, "p") else None
            for block in stage
        ]
        assert rates == pytest.approx([expected] * len(rates))


def test_a_block_is_dropped_for_whole_samples_at_its_rate_and_survivors_are_scaled() -> None:
    torch.manual_seed(0)
    model = resnet_rs(26, 10, width=0.125, stochastic_depth=0.5)
    block = model.layer4[1]  # type: ignore[index]
    assert isinstance(block, Bottleneck)
    nn.init.ones_(block.bn3.weight)
    x = torch.rand(1, 256, 2, 2).expand(4000, -1, -1, -1)
    block.train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        noisy = block(x)
        block.eval()
        clean = block(x[:1])
    dropped = (noisy == x.relu()).flatten(1).all(dim=1)
    assert 0.46 < dropped.float().mean() < 0.54
    survivor = noisy[~dropped][0]
    positive = (survivor > 0) & (clean[0] > 0)
    torch.testing.assert_close((survivor - x[0])[positive], 2 * (clean[0] - x[0])[positive], rtol=1e-3, atol=1e-4)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model = resnet_rs(26, 10, width=0.125, dropout=0.5).eval()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.dropout.train()
        assert not torch.equal(model(x), model(x))


def test_fresh_blocks_are_their_shortcuts() -> None:
    model = resnet_rs(26, 10, width=0.125)
    gains = [block.bn3.weight for block in model.modules() if isinstance(block, Bottleneck)]
    assert len(gains) == sum(BLOCKS[26])
    assert all(bool((gain == 0).all()) for gain in gains)


def test_batch_norm_momentum_one_keeps_the_last_batchs_statistics() -> None:
    model = resnet_rs(26, 10, width=0.125).train()
    set_bn_momentum(model, 1.0)
    assert isinstance(model, ResNetRS)
    for seed in (0, 1):
        model(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    kept = {name: value.clone() for name, value in model.named_buffers() if "running_mean" in name}
    fresh = resnet_rs(26, 10, width=0.125).train()
    fresh.load_state_dict(model.state_dict())
    set_bn_momentum(fresh, 1.0)
    fresh(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    for name, value in fresh.named_buffers():
        if "running_mean" in name:
            torch.testing.assert_close(value, kept[name])


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnetrs51", {}, "did you mean 'resnetrs50"),
        ("resnet5o", {}, "neither ResNet-RS, EfficientNet-RS nor a timm model"),
        ("resnetrs50", {"widht": 1}, "expected some of width"),
        ("resnetrs50", {"width": 0}, "width: must be"),
        ("resnetrs50", {"blocks": [1, 2]}, "blocks: must be four whole numbers"),
        ("resnet18", {"no_such": 1}, "no_such"),
    ],
)
def test_a_model_that_cannot_be_built_is_an_error_that_names_the_reason(
    name: str, args: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(name, 10, args)


def test_any_timm_model_builds_with_its_noise() -> None:
    model = build_model("resnet18", 7, {}, dropout=0.1, stochastic_depth=0.1)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 7)
