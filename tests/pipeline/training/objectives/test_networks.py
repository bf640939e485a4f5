"""BYOL's loss and targets, and the heads of the three methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.core.config import config_of
from pipeline.core.schema import PretrainConfig
from pipeline.inputs.streams import StreamSpec
from pipeline.models.registry import build_model, on_meta
from pipeline.models.resnet_rs import ModelError
from pipeline.models.shared_batch_norm import share_statistics
from pipeline.training.distributed import Ranks
from pipeline.training.ema import EMA
from pipeline.training.job import TrainJob
from pipeline.training.objectives.byol import bootstrap, byol_loss
from pipeline.training.objectives.choice import build_network
from pipeline.training.objectives.interface import MicroBatch
from pipeline.training.objectives.networks import PretrainingNetwork, num_features
from tests.training_processes import in_group

SMALL: dict[str, Any] = {
    "model": "resnetrs26", "model_args": {"width": 0.125, "blocks": [1, 1, 1, 1]}, "image_size": 16, "projection_dim": 8,
}  # fmt: skip


def network_of(objective: str, **changes: Any) -> PretrainingNetwork:
    torch.manual_seed(0)
    network = build_network(PretrainConfig.model_validate(SMALL | {"objective": objective} | changes), 0)
    assert isinstance(network, PretrainingNetwork)
    return network


def byol_reference(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Equation 2 of the paper for both views of each image, in float64."""
    q, z = predictions.astype(np.float64), targets.astype(np.float64)
    total = 0.0
    for image in range(len(q) // 2):
        for view, other in ((2 * image, 2 * image + 1), (2 * image + 1, 2 * image)):
            p, t = q[view] / np.linalg.norm(q[view]), z[other] / np.linalg.norm(z[other])
            total += float(((p - t) ** 2).sum())
    return total / (len(q) // 2)


def test_byols_loss_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    predictions, targets = torch.randn(2, 12, 5, generator=generator)
    assert byol_loss(predictions, targets).item() == pytest.approx(
        byol_reference(predictions.numpy(), targets.numpy()), rel=1e-5
    )


def test_byols_targets_use_the_batchs_statistics_and_change_nothing_of_the_average() -> None:
    model = network_of("byol").train()
    average = EMA(model, 0.9).module
    assert isinstance(average, PretrainingNetwork)
    with torch.no_grad():
        for module in average.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                module.running_mean += 100  # in eval mode, targets would be far off
    before = copy.deepcopy(average.state_dict())
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    terms = bootstrap(model, average, Ranks())(model, MicroBatch(images, None))
    terms.loss.backward()
    expected = byol_loss(model(images), copy.deepcopy(model).project(images))
    torch.testing.assert_close(terms.loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert not any(module.training for module in average.modules())
    assert all(parameter.grad is None for parameter in average.parameters())


def byol_terms(rank: int, world: int) -> tuple[float, float]:
    """Loss and spread of a rank's share of 8 images, with batch norms as in training."""
    model = network_of("byol").train()
    average = EMA(model, 0.9).module
    assert isinstance(average, PretrainingNetwork)
    if world > 1:
        share_statistics(model)
    before = copy.deepcopy(average.state_dict())
    images = torch.randn(8, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    images *= torch.arange(1, 9).view(-1, 1, 1, 1, 1)  # the ranks' statistics differ
    own = images.chunk(world)[rank].flatten(0, 1)
    terms = bootstrap(model, average, Ranks(rank, world))(model, MicroBatch(own, None))
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    return terms.loss.item(), terms.metrics["spread"].item()


def test_byols_targets_of_two_ranks_are_those_of_one_with_all_images(tmp_path: Path) -> None:
    (one, expected), (first, second) = byol_terms(0, 1), in_group(tmp_path / "meeting", byol_terms, 2)
    assert (first[0] + second[0]) / 2 == pytest.approx(one, rel=1e-4)
    assert first[1] == second[1] == pytest.approx(expected, rel=1e-4)


def test_byols_decay_rises_from_its_base_to_one() -> None:
    config = PretrainConfig.model_validate(SMALL | {"objective": "byol", "ema_decay": 0.9, "epochs": 100})
    stream = StreamSpec("images", shard_urls=(), table_urls=(), num_rows=(), images_per_step=4)
    job = TrainJob(
        name="pretrain", folder="", config=config, streams=(stream,), num_classes=0, num_labeled=4, seed=0, threads=1, device="cpu"
    )  # fmt: skip
    assert [round(job.ema_decay(step), 4) for step in (0, 50, 100)] == [0.9, 0.95, 1.0]


def test_heads_have_the_published_layers() -> None:
    def layers(head: nn.Module) -> list[str]:
        return [type(module).__name__ for module in head.children()]

    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert layers(network_of("simclr").projector) == [*hidden, "Linear", "BatchNorm1d"]
    assert layers(network_of("simclrv2").projector) == [*hidden, *hidden, "Linear", "BatchNorm1d"]
    byol = network_of("byol")
    assert byol.predictor is not None
    assert layers(byol.projector) == layers(byol.predictor) == [*hidden, "Linear"]
    last = list(network_of("simclr").projector.children())[-1]
    assert not last.bias.requires_grad
    assert last.weight.requires_grad


def test_the_head_is_as_wide_as_the_features_unless_told() -> None:
    features = num_features(PretrainConfig.model_validate(SMALL))
    assert network_of("simclr").projector[0].weight.shape == (features, features)  # type: ignore[index]
    assert network_of("simclr", projection_hidden=24).projector[0].weight.shape == (24, features)  # type: ignore[index]
    assert network_of("simclr")(torch.zeros(2, 3, 16, 16)).shape == (2, 8)


def test_a_model_without_a_vector_of_features_is_refused() -> None:
    section = PretrainConfig.model_validate(SMALL | {"model": "test_efficientnet", "model_args": {"global_pool": ""}})
    with pytest.raises(ModelError, match=r"test_efficientnet.*expected one vector an image"):
        num_features(section)


@pytest.mark.parametrize(
    ("model", "arguments", "side"),  # of the features' map before pooling
    [("convnext_atto", {"patch_size": 1}, 4), ("convnext_atto", {}, 1), ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 8)],
)  # fmt: skip
def test_small_images_keep_their_resolution_in_stems_that_timm_has(
    model: str, arguments: dict[str, Any], side: int
) -> None:
    section = PretrainConfig.model_validate({"model": model, "model_args": arguments, "image_size": 32})
    assert num_features(section) > 100
    backbone: Any = on_meta(lambda: build_model(model, 0, arguments))
    features = backbone.forward_features(torch.zeros(1, 3, 32, 32, device="meta"))
    positions = features.shape[1] - backbone.num_prefix_tokens if features.ndim == 3 else features.shape[2] ** 2
    assert positions == side**2


@pytest.mark.parametrize("objective", ["simclr", "simclrv2"])
def test_micro_batches_are_refused_where_they_would_change_the_negatives(objective: str) -> None:
    section = {"objective": objective, "accumulate_steps": 2}
    with pytest.raises(
        ValueError, match=r"pretrain\.accumulate_steps=2: .*micro-batches would change the loss.*objective=byol"
    ):
        config_of({"pretrain": section})
    assert config_of({"pretrain": section | {"objective": "byol"}}).pretrain.accumulate_steps == 2


def test_the_model_and_its_preprocessing_are_the_teachers_unless_given() -> None:
    teacher = {"model": "resnet18", "image_size": 32, "mean": [0.5, 0.5, 0.5], "lr": 0.7}
    config = config_of({"teacher": teacher, "pretrain": {"mean": [0.1, 0.1, 0.1]}})
    assert (config.pretrain.model, config.pretrain.image_size) == ("resnet18", 32)
    assert config.pretrain.mean == (0.1, 0.1, 0.1)
    assert config.pretrain.lr == PretrainConfig().lr
