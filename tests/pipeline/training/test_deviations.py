"""Where timm's defaults differ from the papers: what this trainer does, against the published rule.

One test per row of the table in docs/published.md, from the configuration's defaults to what the optimizer, the model or the
image sees. `timm` stands in a test where its default can be shown to differ. The parts have tests of their own:
test_training_rules.py, test_resnet_rs.py, test_augment.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.data.auto_augment import rand_augment_transform
from timm.layers import DropPath
from torch import nn
from torch.nn import functional

from pipeline.core.schema import TeacherConfig, TrainConfig
from pipeline.inputs import rand_augment
from pipeline.inputs.streams import StreamSpec
from pipeline.inputs.train_transform import make_transform
from pipeline.models.registry import build_model
from pipeline.models.resnet_rs import Bottleneck
from pipeline.training.ema import EMA
from pipeline.training.job import TrainJob
from pipeline.training.state import new_state
from tests.training_processes import digits_job

PAPER = TrainConfig()  # defaults are the paper's: 350 epochs, 4,096 images a step, 0.1 per 256 images
NUM_IMAGES = 1_281_167  # ImageNet's training images


def job_of(**changes: Any) -> TrainJob:
    config = TeacherConfig().model_copy(update=changes)
    stream = StreamSpec("labeled", (), (), (), config.batch_size)
    return digits_job("unused", config, (stream,), NUM_IMAGES)


def small_job(**changes: Any) -> TrainJob:
    return job_of(model="resnetrs26", model_args={"width": 0.125}, **changes)


@pytest.mark.parametrize(("name", "rate"), [("resnetrs50", 0.1), ("resnetrs200", 0.1), ("resnetrs26", 0.5)])
def test_stochastic_depth_is_per_stage(name: str, rate: float) -> None:
    """Every block of stage i of 4 is dropped at rate × (i + 1) / 5."""
    with torch.device("meta"):
        model = build_model(name, 10, {}, 0.0, rate)
    for stage in range(1, 5):
        blocks = [block for block in getattr(model, f"layer{stage}") if isinstance(block, Bottleneck)]
        rates = [float(block.drop_path.p) for block in blocks]
        assert rates == pytest.approx([rate * (stage + 1) / 5] * len(blocks))


def test_timms_stochastic_depth_grows_from_block_to_block() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnetrs50", drop_path_rate=0.1)
    rates = [float(module.drop_prob or 0) for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(set(rates)), "were it constant in a stage, nothing here would need an own rule"


def test_rand_augment_is_always_applied_and_its_magnitude_not_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 2, M = 15 by default: two operations for every image, each at 15 of 10 (Rotate: 45°)."""
    applied: list[tuple[int, float]] = []

    def note(images: torch.Tensor, code: int, magnitude: float) -> torch.Tensor:
        applied.append((code, magnitude))
        return images

    monkeypatch.setattr(rand_augment, "_operate", note)
    view = make_transform(PAPER.model_copy(update={"image_size": 16}))
    for seed in range(50):
        view(np.zeros((16, 16, 3), np.uint8), seed)
    assert len(applied) == 100
    assert {magnitude for _, magnitude in applied} == {15}
    assert rand_augment.arguments("Rotate", 15) == (45.0,)


def test_timms_rand_augment_skips_half_and_clips_at_10() -> None:
    operation = rand_augment_transform("rand-m15-n2", {}).ops[0]
    assert (operation.prob, operation.magnitude_max) == (0.5, None)
    assert rand_augment_transform("rand-m15-n2-p1.0-mmax15", {}).ops[0].prob == 1.0


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.0), (1, 0.32), (2.5, 0.8), (5, 1.6), (177.5, 0.8), (91.25, 0.8 * (1 + math.cos(math.pi / 4))), (350, 0.0)],
)
def test_the_learning_rate_warms_up_from_0_and_falls_as_a_cosine_to_0_step_by_step(
    epoch: float, expected: float
) -> None:
    """0.1 × 4096 / 256 = 1.6 after 5 epochs; half a cosine over the other 345."""
    job = job_of()
    steps_per_epoch = NUM_IMAGES / 4096
    assert job.learning_rate(round(epoch * steps_per_epoch)) == pytest.approx(expected, abs=0.002)
    within_an_epoch = {job.learning_rate(step) for step in range(5000, 5300)}
    assert len(within_an_epoch) == 300, "it changes with every step, not with every epoch"


def test_momentum_is_plain() -> None:
    optimizer = new_state(small_job()).optimizer
    settings = [(group["momentum"], group["nesterov"], group["dampening"]) for group in optimizer.param_groups]
    assert settings == [(0.9, False, 0), (0.9, False, 0)]


def test_all_but_batch_norm_decays_by_4e_5() -> None:
    """Biases too: the classifier's, and those of squeeze-excitation."""
    state = new_state(small_job())
    decay = {id(p): group["weight_decay"] for group in state.optimizer.param_groups for p in group["params"]}
    norms = {id(p) for m in state.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    found = {name: decay[id(p)] for name, p in state.model.named_parameters()}
    assert found == {name: 0.0 if id(p) in norms else 4e-5 for name, p in state.model.named_parameters()}
    assert found["fc.bias"] == found["layer1.0.se.fc1.bias"] == 4e-5
    assert found["layer1.0.bn3.weight"] == found["bn1.bias"] == 0


@pytest.mark.parametrize(("updates", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (990, 0.991), (10**6, 0.9999)])
def test_the_moving_average_forgets_by_the_number_of_updates(updates: int, decay: float) -> None:
    """min(0.9999, (1 + t) / (10 + t)): a weight goes from 0 to 1 in one step."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    ema = EMA(model, PAPER.ema_decay)
    ema.num_updates = updates
    nn.init.ones_(model.weight)
    ema.update(model)
    assert float(ema.module.weight) == pytest.approx(1 - decay, rel=1e-3)  # type: ignore[arg-type]


def test_batch_norm_keeps_the_last_batchs_statistics_and_the_moving_average_averages_them() -> None:
    state = new_state(small_job())
    norm = state.model.bn1
    assert isinstance(norm, nn.BatchNorm2d)
    assert all(m.momentum == 1.0 for m in state.model.modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(64, norm.num_features, 2, 2) + 3
    norm.train()(x)
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    state.ema.update(state.model)
    torch.testing.assert_close(state.ema.module.bn1.running_mean, 0.9 * norm.running_mean)  # type: ignore[union-attr, operator]


def test_crops_are_resized_bicubically(photo: np.ndarray) -> None:
    """timm draws bilinear or bicubic for each image; here no view is bilinear."""
    whole = PAPER.augment.model_copy(update={"crop_scale": (1, 1), "crop_ratio": (1, 1), "num_ops": 0, "hflip": 0})
    view = make_transform(PAPER.model_copy(update={"augment": whole, "image_size": 64}))
    image = photo[:400, :400].copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    sizes: dict[str, Any] = {"size": (64, 64), "antialias": True, "align_corners": False}
    bicubic, bilinear = (functional.interpolate(pixels, mode=mode, **sizes)[0] for mode in ("bicubic", "bilinear"))
    views = [view(image, seed) for seed in range(8)]
    assert all(torch.equal(seen, bicubic) for seen in views)
    assert not torch.equal(bicubic, bilinear)
