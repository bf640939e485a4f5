"""timm's train.py, rebuilt from the released package's functions (the package ships no train.py).

create_dataset (WebDataset shards) → create_loader (worker processes, uint8 collation, PrefetchLoader) → forward,
LabelSmoothingCrossEntropy, backward, SGD, ModelEmaV3, cosine schedule on updates; the loss is read at every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3
from torch import nn

from data.shards.split import Split
from data.storage import parent
from pipeline.core.schema import TrainConfig


def make_loader(split: Split, config: TrainConfig, device: str = "cpu") -> torch.utils.data.DataLoader:
    """Return timm's loader of a split's shards, named `NAME-000000.tar` and so on, in one folder."""
    first, last = split.shards[0], split.shards[-1]
    prefix, start = first.name.rsplit("-", 1)
    dataset = create_dataset(
        f"wds/{prefix}", root=parent(first.url), split=f"{prefix}-{{{start}..{last.name.rsplit('-', 1)[1]}}}.tar", is_training=True,
        batch_size=config.batch_size, seed=0, num_samples=split.num_samples,
    )  # fmt: skip
    return create_loader(
        dataset, (3, config.image_size, config.image_size), config.batch_size, is_training=True, interpolation=config.interpolation,
        auto_augment=f"rand-m{config.augment.magnitude:g}-n{config.augment.num_ops}-p1.0-mmax{config.augment.magnitude:g}",
        num_workers=config.loader_workers, mean=config.mean, std=config.std, device=torch.device(device), persistent_workers=True,
    )  # fmt: skip


def train(
    model: nn.Module, loader: Iterable[tuple[torch.Tensor, torch.Tensor]], config: TrainConfig, steps: int, warm_up: int
) -> float:
    """Return steps per second after the first `warm_up` steps. Precision, memory format and compilation are those of `config`."""
    optimizer = create_optimizer_v2(model, "momentum", config.lr, config.weight_decay, config.momentum)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", 1, step_on_epochs=False, updates_per_epoch=steps)
    average, loss_function = ModelEmaV3(model, config.ema_decay), LabelSmoothingCrossEntropy(config.label_smoothing)
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16")
    if config.compile:
        model.compile()
    losses, done, started = AverageMeter(), 0, 0.0
    model.train()
    while done < steps:
        for images, target in loader:
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast:
                loss = loss_function(model(images), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            average.update(model, step=done)
            losses.update(loss.item(), len(images))
            scheduler.step_update(num_updates=done, metric=losses.avg)
            if done == warm_up:
                started = time.perf_counter()
            if done == steps:
                break
    return (steps - warm_up) / (time.perf_counter() - started)
