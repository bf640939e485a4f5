"""The training step, and the network that it trains: frozen, compiled and distributed as the job says.

A step is a function of the state before it and the step's number: the batch follows from the number, and so does the seed of
mixup, dropout and stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.inputs.batches import TrainBatch
from pipeline.inputs.mixup import Mixing, draw_mixing
from pipeline.inputs.noise import add_noise
from pipeline.inputs.train_transform import normalize
from pipeline.models.shared_batch_norm import share_statistics
from pipeline.training.activations import checkpoint_activations
from pipeline.training.distributed import share_gradients
from pipeline.training.job import TrainJob
from pipeline.training.objectives.cross_entropy import classify
from pipeline.training.objectives.interface import MicroBatch, Objective, Terms
from pipeline.training.optimizer import NORMS
from pipeline.training.state import TrainState, freeze_backbone


def train_step(
    job: TrainJob,
    state: TrainState,
    network: nn.Module,
    batch: TrainBatch,
    rank: int,
    objective: Objective = classify,
) -> Terms:
    """Make one optimizer step; return the objective's means over this rank's images.

    Args:
        network: `training_network` of the state's model.
    """
    torch.manual_seed((job.seed * 1_000_003 + state.step) * 1_009 + rank)
    pixels, targets = _on_device(job, batch)
    mixing = draw_mixing(len(pixels), job.config.mixup, pixels.device) if job.config.mixup else None
    for group in state.optimizer.param_groups:
        group["lr"] = job.learning_rate(state.step) * group.get("lr_scale", 1.0)
    # of several ranks, gradients stay views of DDP's buckets; else micro-batches would add up beside these
    state.optimizer.zero_grad(set_to_none=not isinstance(network, DistributedDataParallel))
    terms = _accumulate_gradients(job, network, objective, pixels, targets, mixing)
    state.optimizer.step()
    state.ema.decay = job.ema_decay(state.step)
    state.ema.update(state.model)
    state.step += 1
    return terms


def _on_device(job: TrainJob, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Noised pixels, uint8 (N, 3, S, S) or (N, k, 3, S, S) for k views, and targets, float32 (N, C) or None."""
    pixels = batch.images.to(job.device, non_blocking=True)
    if batch.noise is not None:
        views = add_noise(_flat_views(job, pixels), batch.noise, job.config.augment, job.config.mean)
        pixels = views.reshape(pixels.shape)
    return pixels, None if batch.targets is None else batch.targets.dense(job.device)


def _flat_views(job: TrainJob, pixels: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) as it is; (N, k, 3, S, S) as (N · k, 3, S, S), the views of an image side by side. Of clips with their frames."""
    return pixels.flatten(0, -1 - len(job.config.view_shape))


def _accumulate_gradients(
    job: TrainJob,
    network: nn.Module,
    objective: Objective,
    pixels: torch.Tensor,
    targets: torch.Tensor | None,
    mixing: Mixing | None,
) -> Terms:
    """Add the gradients of all micro-batches, each weighted by its share of the images; return the means of all images.

    Ranks average gradients once, with the last micro-batch.
    """
    parts: list[Terms] = []
    for rows in micro_batches(job.config.accumulate_steps):
        micro_batch, share = _micro_batch(job, pixels, targets, mixing, rows), len(pixels[rows]) / len(pixels)
        with _gradients_kept(network) if len(parts) + 1 < job.config.accumulate_steps else nullcontext():
            with _autocast(job):
                terms = objective(network, micro_batch)
                loss = terms.loss * share
            loss.backward()
        parts.append(Terms(loss.detach(), {name: value * share for name, value in terms.metrics.items()}))
    metrics = {name: torch.stack([part.metrics[name] for part in parts]).sum() for name in parts[0].metrics}
    return Terms(torch.stack([part.loss for part in parts]).sum(), metrics)


def micro_batches(accumulate_steps: int) -> Iterator[slice]:
    """The rows of each micro-batch: every n-th image of the batch.

    A batch has labeled images first, then pseudo-labeled ones. So every micro-batch has its share of both (to within one image), as
    batch norm needs, whose statistics are those of a micro-batch.
    """
    return (slice(first, None, accumulate_steps) for first in range(accumulate_steps))


def _micro_batch(
    job: TrainJob, pixels: torch.Tensor, targets: torch.Tensor | None, mixing: Mixing | None, rows: slice
) -> MicroBatch:
    """Normalized and mixed images, and their targets.

    Images are mixed with partners of the whole batch. Only a micro-batch is ever held as floats.
    """
    images, labels = _normalized(job, pixels[rows]), None if targets is None else targets[rows]
    if mixing is None or labels is None or targets is None:
        return MicroBatch(images, labels)
    partners, weight = mixing.partners[rows], mixing.weight[rows]
    images = torch.lerp(_normalized(job, pixels[partners]), images, weight.view(-1, 1, 1, 1))
    return MicroBatch(images, torch.lerp(targets[partners], labels, weight.view(-1, 1)))


def _normalized(job: TrainJob, pixels: torch.Tensor) -> torch.Tensor:
    return normalize(_flat_views(job, pixels), job.config.mean, job.config.std).contiguous(
        memory_format=_memory_format(job)
    )


def _memory_format(job: TrainJob) -> torch.memory_format:
    return torch.channels_last if job.config.channels_last else torch.contiguous_format


def _gradients_kept(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, a backward pass adds to this rank's gradients, and sends none."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _autocast(job: TrainJob) -> torch.autocast:
    return torch.autocast(job.device, torch.bfloat16, enabled=job.config.precision == "bf16")


@contextmanager
def device_settings(job: TrainJob) -> Iterator[None]:
    """Set torch's threads; on GPUs also, inside alone, how cuDNN chooses kernels, and the precision of float32 products.

    So later predictions of the process, such as calibration, do not depend on whether it trained.
    """
    torch.set_num_threads(job.threads)
    if job.device != "cuda":
        yield
        return
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, products.allow_tf32
    cudnn.benchmark = True  # measures the kernels for each shape once
    products.allow_tf32 = job.config.precision == "tf32"
    try:
        yield
    finally:
        cudnn.benchmark, products.allow_tf32 = before


def training_network(model: nn.Module, job: TrainJob, world: int, step: int = 0) -> nn.Module:
    """The model in training mode, compiled if configured, with gradients averaged over `world` ranks. The parameters stay the same.

    Batch norms of several ranks share their statistics. While `step` is among the first, the backbone is frozen; at step
    `job.frozen_steps`, `unfrozen_network` replaces the network.

    Raises TrainingError when activations are to be checkpointed, and the model cannot.
    """
    config = job.config
    if world > 1:
        share_statistics(model)
    if config.checkpoint_activations:
        checkpoint_activations(model, job.name, config.compile)
    if config.compile:
        model.compile(dynamic=False)  # one graph for each size of micro-batches: two if they don't divide the batch
    if step < job.frozen_steps:
        freeze_backbone(model, True)
    return _distributed(to_training_mode(model), job, world)


def unfrozen_network(network: nn.Module, job: TrainJob, world: int) -> nn.Module:
    """The network of the steps after the first `job.frozen_steps`: of the same model, all of which is trained."""
    model: nn.Module = network.module if isinstance(network, DistributedDataParallel) else network
    model.zero_grad(set_to_none=True)  # the head's gradients are views of the old wrapper's buckets
    freeze_backbone(model, False)
    return _distributed(to_training_mode(model), job, world)


def _distributed(model: nn.Module, job: TrainJob, world: int) -> nn.Module:
    """With several ranks, the model in DDP."""
    config = job.config
    if world == 1:
        return model
    images = config.views * math.ceil(job.images_per_step / world / config.accumulate_steps)
    zeros = torch.zeros(images, *config.view_shape, device=job.device).contiguous(memory_format=_memory_format(job))
    with _autocast(job):
        return share_gradients(model, zeros)


def to_training_mode(network: nn.Module) -> nn.Module:
    """Set training mode, except for frozen normalization layers: their statistics stay fixed, like their gains.

    A layer without gains follows the parameters before it: those of the layer that it normalizes.
    """
    network.train()
    is_trained = True
    for module in network.modules():
        own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        is_trained = any(own) if own else is_trained
        if isinstance(module, NORMS) and not is_trained:
            module.eval()
    return network
