"""The training step, and the network that it trains: frozen, compiled and distributed as the job says.

A step is a function of the state before it and the step's number: the batch follows from the number, and so does the seed of
mixup, dropout and stochastic depth.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.inputs.batches import TrainBatch
from pipeline.inputs.noise import add_noise
from pipeline.inputs.train_transform import normalize
from pipeline.training.distributed import share_gradients
from pipeline.training.job import TrainJob
from pipeline.training.objective import mix_images, soft_cross_entropy
from pipeline.training.optimizer import NORMS
from pipeline.training.state import TrainState


def train_step(job: TrainJob, state: TrainState, network: nn.Module, batch: TrainBatch, rank: int) -> torch.Tensor:
    """Make one optimizer step; return the mean loss of this rank's images, a scalar on the device.

    Args:
        network: `training_network` of the state's model.
    """
    torch.manual_seed((job.seed * 1_000_003 + state.step) * 1_009 + rank)
    images, targets = _on_device(job, batch)
    if job.config.mixup:
        images, targets = mix_images(images, targets, job.config.mixup)
    for group in state.optimizer.param_groups:
        group["lr"] = job.learning_rate(state.step)
    with _autocast(job):
        loss = soft_cross_entropy(network(images), targets)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.ema.update(state.model)
    state.step += 1
    return loss.detach()


def _on_device(job: TrainJob, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, noised and normalized, float32 (N, 3, S, S), and targets, float32 (N, C)."""
    config = job.config
    images = batch.images.to(job.device, non_blocking=True)
    if batch.noise is not None:
        images = add_noise(images, batch.noise, config.augment, config.mean)
    images = normalize(images, config.mean, config.std)
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, batch.targets.dense(job.device)


def _autocast(job: TrainJob) -> torch.autocast:
    return torch.autocast(job.device, torch.bfloat16, enabled=job.config.precision == "bf16")


def training_network(model: nn.Module, job: TrainJob, world: int) -> nn.Module:
    """The model in training mode, compiled if configured, with gradients averaged over `world` ranks. The parameters stay the same."""
    if job.config.compile:
        model.compile()
    if world == 1:
        return to_training_mode(model)
    side, images = job.config.image_size, job.images_per_step // world
    with _autocast(job):
        network = share_gradients(model, torch.zeros(images, 3, side, side, device=job.device))
    return to_training_mode(network)


def to_training_mode(network: nn.Module) -> nn.Module:
    """Set training mode, except for frozen normalization layers: their statistics stay fixed, like their gains."""
    network.train()
    for module in network.modules():
        if isinstance(module, NORMS) and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    return network
