"""The training step, and the network that it trains: frozen, compiled and distributed as the job says.

A step is a function of the state before it and the step's number: the batch follows from the number, and so does the seed of
mixup, dropout and stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.inputs.batches import TrainBatch
from pipeline.inputs.noise import add_noise
from pipeline.inputs.train_transform import normalize
from pipeline.training.activations import checkpoint_activations
from pipeline.training.distributed import share_gradients, share_statistics
from pipeline.training.job import TrainJob
from pipeline.training.objective import Mixing, draw_mixing, soft_cross_entropy
from pipeline.training.optimizer import NORMS
from pipeline.training.state import TrainState


def train_step(job: TrainJob, state: TrainState, network: nn.Module, batch: TrainBatch, rank: int) -> torch.Tensor:
    """Make one optimizer step; return the mean loss of this rank's images, a scalar on the device.

    Args:
        network: `training_network` of the state's model.
    """
    torch.manual_seed((job.seed * 1_000_003 + state.step) * 1_009 + rank)
    pixels, targets = _on_device(job, batch)
    mixing = draw_mixing(len(pixels), job.config.mixup, pixels.device) if job.config.mixup else None
    for group in state.optimizer.param_groups:
        group["lr"] = job.learning_rate(state.step)
    state.optimizer.zero_grad(set_to_none=True)
    loss = _accumulate_gradients(job, network, pixels, targets, mixing)
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return loss


def _on_device(job: TrainJob, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Noised pixels, uint8 (N, 3, S, S), and targets, float32 (N, C)."""
    pixels = batch.images.to(job.device, non_blocking=True)
    if batch.noise is not None:
        pixels = add_noise(pixels, batch.noise, job.config.augment, job.config.mean)
    assert batch.targets is not None, "a stream with targets `none` is for another objective"
    return pixels, batch.targets.dense(job.device)


def _accumulate_gradients(
    job: TrainJob, network: nn.Module, pixels: torch.Tensor, targets: torch.Tensor, mixing: Mixing | None
) -> torch.Tensor:
    """Add the gradients of all micro-batches, each weighted by its share of the images; return the mean loss of all images.

    Ranks average gradients once, with the last micro-batch.
    """
    losses: list[torch.Tensor] = []
    for rows in micro_batches(job.config.accumulate_steps):
        images, labels = _micro_batch(job, pixels, targets, mixing, rows)
        with _gradients_kept(network) if len(losses) + 1 < job.config.accumulate_steps else nullcontext():
            with _autocast(job):
                loss = soft_cross_entropy(network(images), labels) * (len(images) / len(pixels))
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def micro_batches(accumulate_steps: int) -> Iterator[slice]:
    """The rows of each micro-batch: every n-th image of the batch.

    A batch has labeled images first, then pseudo-labeled ones. So every micro-batch has its share of both (to within one image), as
    batch norm needs, whose statistics are those of a micro-batch.
    """
    return (slice(first, None, accumulate_steps) for first in range(accumulate_steps))


def _micro_batch(
    job: TrainJob, pixels: torch.Tensor, targets: torch.Tensor, mixing: Mixing | None, rows: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized and mixed images, float32 (M, 3, S, S), and their targets, float32 (M, C).

    Images are mixed with partners of the whole batch. Only a micro-batch is ever held as floats.
    """
    images, labels = _normalized(job, pixels[rows]), targets[rows]
    if mixing is None:
        return images, labels
    partners, weight = mixing.partners[rows], mixing.weight[rows]
    images = torch.lerp(_normalized(job, pixels[partners]), images, weight.view(-1, 1, 1, 1))
    return images, torch.lerp(targets[partners], labels, weight.view(-1, 1))


def _normalized(job: TrainJob, pixels: torch.Tensor) -> torch.Tensor:
    return normalize(pixels, job.config.mean, job.config.std).contiguous(memory_format=_memory_format(job))


def _memory_format(job: TrainJob) -> torch.memory_format:
    return torch.channels_last if job.config.channels_last else torch.contiguous_format


def _gradients_kept(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, a backward pass adds to this rank's gradients, and sends none."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def _autocast(job: TrainJob) -> torch.autocast:
    return torch.autocast(job.device, torch.bfloat16, enabled=job.config.precision == "bf16")


def set_up_device(job: TrainJob) -> None:
    """Set what torch keeps per process: threads, how cuDNN chooses its kernels, and the precision of float32 products on GPUs."""
    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        torch.backends.cudnn.benchmark = True  # measures the kernels for each shape once
        torch.backends.cuda.matmul.allow_tf32 = job.config.precision == "tf32"


def training_network(model: nn.Module, job: TrainJob, world: int) -> nn.Module:
    """The model in training mode, compiled if configured, with gradients averaged over `world` ranks. The parameters stay the same.

    On several GPUs, batch norms share their statistics. Raises TrainingError when activations are to be checkpointed, and the model
    cannot.
    """
    config = job.config
    same_statistics = world > 1 and job.device == "cuda"
    if same_statistics:
        model = share_statistics(model)
    if config.checkpoint_activations:
        checkpoint_activations(model, job.name, config.compile)
    if config.compile:
        model.compile(dynamic=False)  # one graph for each size of micro-batches: two if they don't divide the batch
    to_training_mode(model)
    if world == 1:
        return model
    images, side = math.ceil(job.images_per_step / world / config.accumulate_steps), config.image_size
    zeros = torch.zeros(images, 3, side, side, device=job.device).contiguous(memory_format=_memory_format(job))
    with _autocast(job):
        return share_gradients(model, zeros, share_buffers=not same_statistics)


def to_training_mode(network: nn.Module) -> nn.Module:
    """Set training mode, except for frozen normalization layers: their statistics stay fixed, like their gains."""
    network.train()
    for module in network.modules():
        if isinstance(module, NORMS) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    return network
