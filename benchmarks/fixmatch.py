"""FixMatch (arXiv 2001.07685) for benchmarks, on images in memory: a weakly augmented view of an unlabeled image labels a strong one.

A step depends only on the previous state, the seed and its number, so that a killed training continues to the same bytes.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data.images.decode import Pixels, decode
from data.progress_bar import ProgressBar
from data.shards.image_reader import ImageReader
from data.shards.split import Split
from pipeline.core.schema import AugmentConfig, TrainConfig
from pipeline.inputs.train_transform import TrainTransform, normalize, sample_seed
from pipeline.models.registry import build_model
from pipeline.training.checkpoint import load_newest, save_checkpoint
from pipeline.training.ema import EMA
from pipeline.training.optimizer import build_optimizer
from pipeline.training.state import TrainState

WEAK = AugmentConfig(crop="pad_crop", pad=4, hflip=0.5, num_ops=0)
"""Flip and shift by up to an eighth of the side (section 2.3)."""
STRONG = WEAK.model_copy(update={"num_ops": 2, "magnitude": 10.0, "cutout": 16})
"""RandAugment and cut-out on top of it, as this project does them."""
_CHECKPOINT_S = 60.0
_LABELED, _WEAK, _STRONG = range(3)


@dataclass(frozen=True)
class FixMatch:
    """Hyperparameters as published (table 4); the number of steps follows from the compute.

    Attributes:
        batch_size: labeled images per step, B.
        ratio: unlabeled images per labeled one, μ.
        weight: of the unlabeled loss, λ.
        lr: peak, η; decays as η cos(7πk / 16K).
    """

    steps: int
    batch_size: int = 64
    ratio: int = 7
    threshold: float = 0.95
    weight: float = 1.0
    lr: float = 0.03
    weight_decay: float = 5e-4
    ema_decay: float = 0.999


@dataclass(frozen=True)
class Images:
    """Decoded images, (H, W, 3) uint8 each, and labels, (N,) int64, −1 if unlabeled."""

    pixels: list[Pixels]
    labels: np.ndarray


def read_images(split: Split) -> Images:
    """Decode all images of a split. Raises DecodeError."""
    pixels: list[Pixels] = []
    labels: list[int] = []
    with ImageReader([shard.url for shard in split.shards]) as reader:
        for position, shard in enumerate(split.shards):
            for row in shard.index().to_pylist():
                pixels.append(decode(reader.read(position, row["offset"], row["size"])))
                labels.append(-1 if row["label"] is None else row["label"])
    return Images(pixels, np.array(labels, np.int64))


def train(
    labeled: Images, unlabeled: Images, model: TrainConfig, method: FixMatch, num_classes: int, seed: int, folder: str
) -> nn.Module:
    """Train, or continue from the last checkpoint in the folder; return the network with EMA weights.

    Args:
        model: network and preprocessing; its noise and schedule are ignored (FixMatch has no dropout).
    """
    torch.manual_seed(seed)
    network = build_model(model.model, num_classes, model.model_args, 0.0, model.stochastic_depth)
    memory = torch.channels_last if model.channels_last else torch.contiguous_format
    network.to(memory_format=memory).train()
    optimizer = build_optimizer(network, 0.9, method.weight_decay, "nesterov")
    state, saved = TrainState(network, EMA(network, method.ema_decay), optimizer), time.monotonic()
    if (checkpoint := load_newest(folder)) is not None:
        state.restore(checkpoint)
    for step in ProgressBar(
        range(state.step, method.steps), initial=state.step, total=method.steps, desc="fixmatch", unit="step"
    ):
        rows = _chosen(len(labeled.pixels), method.batch_size, step, seed, _LABELED)
        others = _chosen(len(unlabeled.pixels), method.batch_size * method.ratio, step, seed, _WEAK)
        sure = views(labeled, rows, WEAK, model, step, seed, _LABELED)
        weak = views(unlabeled, others, WEAK, model, step, seed, _WEAK)
        strong = views(unlabeled, others, STRONG, model, step, seed, _STRONG)
        take_step(state, sure, weak, strong, torch.from_numpy(labeled.labels[rows]), method)
        if time.monotonic() - saved > _CHECKPOINT_S or state.step == method.steps:
            save_checkpoint(folder, state.step, state.as_checkpoint())
            saved = time.monotonic()
    return state.ema.module


def take_step(
    state: TrainState,
    labeled: torch.Tensor,
    weak: torch.Tensor,
    strong: torch.Tensor,
    labels: torch.Tensor,
    method: FixMatch,
) -> None:
    """Make one update: cross-entropy on labeled images, and on strong views whose weak view is above the threshold (equations 3, 4)."""
    torch.manual_seed(state.step)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, method)
    with torch.no_grad():
        answers = state.model(weak)
    logits = state.model(torch.cat([labeled, strong]).contiguous(memory_format=_memory(labeled)))
    supervised = F.cross_entropy(logits[: len(labeled)], labels)
    loss = supervised + method.weight * unlabeled_loss(logits[len(labeled) :], answers, method.threshold)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1


def unlabeled_loss(strong: torch.Tensor, weak: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean over images of the cross-entropy of `strong` logits, (N, C), with the class of `weak`, (N, C); 0 below the threshold."""
    confidence, label = F.softmax(weak, dim=1).max(dim=1)
    return (F.cross_entropy(strong, label, reduction="none") * (confidence >= threshold)).mean()


def learning_rate(step: int, method: FixMatch) -> float:
    """η cos(7πk / 16K)."""
    return method.lr * math.cos(7 * math.pi * step / (16 * method.steps))


def _chosen(number: int, count: int, step: int, seed: int, stream: int) -> np.ndarray:
    """Return the rows of a step, from passes over all images, each in another order."""
    places = np.arange(step * count, (step + 1) * count)
    orders = {e: np.random.default_rng([seed, stream, e]).permutation(number) for e in np.unique(places // number)}
    return np.array([orders[place // number][place % number] for place in places])


def views(
    images: Images, rows: np.ndarray, augment: AugmentConfig, model: TrainConfig, step: int, seed: int, stream: int
) -> torch.Tensor:
    """Return normalized views, (N, 3, S, S) float32."""
    transform = TrainTransform(augment, model.image_size, model.interpolation, model.mean)
    made = [transform(images.pixels[row], sample_seed(seed, stream, step, int(row))) for row in rows]
    memory = torch.channels_last if model.channels_last else torch.contiguous_format
    return normalize(torch.stack(made), model.mean, model.std).contiguous(memory_format=memory)


def _memory(images: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
