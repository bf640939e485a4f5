"""The family for clips against the counts of the released code, and what time, noise and variants do."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.schema import clips as schema
from pipeline.models.fold_batch_norm import fold_batch_norm
from pipeline.models.memory import count_pass
from pipeline.models.registry import build_model, count_flops, count_parameters, on_meta
from pipeline.models.resnet3d_rs import CLIP_MODELS, Bottleneck3d, ResNet3dRS, r3d50, resnet3d_rs
from pipeline.models.resnet_rs import ModelError, set_bn_momentum
from pipeline.training.ema import EMA

SMALL: dict[str, Any] = {"width": 0.125, "small_input": True}


def clips(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small_model(**fields: Any) -> ResNet3dRS:
    torch.manual_seed(0)
    return resnet3d_rs(50, 10, **SMALL, **fields)


@pytest.mark.parametrize(
    ("depth", "fields", "parameters"),
    [
        (50, {}, 48_129_840),
        (101, {}, 84_969_520),
        (152, {}, 114_788_144),
        (200, {}, 121_376_560),
        (50, {"self_gating": False}, 42_555_440),
        (50, {"self_gating": False, "se_ratio": 0}, 32_476_784),
    ],
)
def test_parameters_are_the_released_codes(depth: int, fields: dict[str, Any], parameters: int) -> None:
    assert count_parameters(on_meta(lambda: resnet3d_rs(depth, **fields))) == parameters


def test_the_baseline_has_the_released_codes_parameters() -> None:
    assert count_parameters(on_meta(r3d50)) == 33_617_872


@pytest.mark.parametrize(("depth", "giga"), [(50, 88.0), (101, 175.4), (152, 256.2), (200, 312.1)])
def test_multiply_adds_of_32_frames_are_the_released_codes(depth: int, giga: float) -> None:
    model = on_meta(lambda: resnet3d_rs(depth)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 32, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.01)


def test_the_order_of_frames_changes_the_output() -> None:
    model = small_model().eval()
    with torch.no_grad():
        assert not torch.allclose(model(clips()), model(clips().flip(1)), atol=1e-4)


def test_small_clips_keep_height_and_width_up_to_the_second_stage() -> None:
    model = small_model().eval()
    with torch.no_grad():
        features = model.maxpool(model.stem(clips().transpose(1, 2)))
        assert features.shape == (2, 8, 8, 32, 32)
        for stage in model.stages:
            features = stage(features)
    assert features.shape == (2, 256, 8, 4, 4)


def test_stochastic_depth_is_constant_in_a_stage_and_on_in_training_alone() -> None:
    model = small_model(stochastic_depth=0.5)
    rates = [{block.drop_path.p for block in stage if isinstance(block, Bottleneck3d)} for stage in model.stages]  # type: ignore[attr-defined]
    assert rates == [{0.2}, {0.3}, {0.4}, {0.5}]
    frozen = model.train()
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    with torch.no_grad():
        assert not torch.equal(frozen(clips()), frozen(clips()))
        assert torch.equal(model.eval()(clips()), model(clips()))


def test_the_ema_averages_the_batch_norms_statistics() -> None:
    model = small_model()
    set_bn_momentum(model, 1.0)
    ema = EMA(model, 0.9999)
    model.train()(clips())
    ema.update(model)
    name = "stem.1.running_mean"
    expected = 0.9 * model.state_dict()[name]  # the first update has decay 1 / 10, and the mean began at 0
    torch.testing.assert_close(ema.module.state_dict()[name], expected)
    assert expected.abs().max() > 0


def test_checkpointed_blocks_give_the_same_gradient() -> None:
    gradients = []
    for enable in (False, True):
        model = small_model().train()
        model.set_grad_checkpointing(enable)
        model(clips()).sum().backward()
        gradient = model.stem[0].weight.grad
        assert isinstance(gradient, torch.Tensor)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("fields", "named"), [({"width": 0}, "width"), ({"r3d": "yes"}, "r3d"), ({"gating": True}, "gating")]
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=f"^{named}"):
        resnet3d_rs(50, **fields)
    with pytest.raises(ModelError, match=r"^r3d"):
        resnet3d_rs(101, r3d=True)


def test_the_registry_builds_every_clip_model_that_a_configuration_may_name() -> None:
    assert schema.MODELS == CLIP_MODELS
    for name in CLIP_MODELS:
        assert isinstance(on_meta(partial(build_model, name, 10, {"width": 0.125})), ResNet3dRS)


def test_batch_norms_fold_into_3d_convolutions() -> None:
    model, few = small_model(), clips()[:, :4, :, :16, :16].contiguous()
    model.train()(few)
    folded = fold_batch_norm(model, (4, 3, 16, 16))
    assert not any(isinstance(module, nn.BatchNorm3d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(few), model.eval()(few), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_flops_and_memory_grow_with_the_frames() -> None:
    flops = [count_flops(on_meta(small_model), (frames, 3, 32, 32)) for frames in (8, 16)]
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.01)
    kept = [count_pass(small_model, (frames, 3, 32, 32), bf16=False, trains=True).kept_per_image for frames in (8, 16)]
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.05)
