"""What the processes of one training tell each other; with one process, nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_ranks(*values: float) -> list[float]:
    """Each value summed over the processes, in one message; all get the same sums."""
    if not distributed.is_initialized():
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def gather(value: Any) -> list[Any]:
    """Every process's value, by rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_statistics(model: nn.Module) -> nn.Module:
    """The model, its batch norms replaced by ones that take their statistics over the images of all processes. Parameters and
    buffers stay the same tensors.

    timm's converter, not torch's: many timm models have the activation in the norm layer, which torch's leaves out.
    """
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted


def share_gradients(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """The model, with gradients averaged over the processes, and batch-norm statistics of all their images where there are GPUs.

    One backward pass is made in vain, which leaves model and statistics as they are: after its first one torch sorts the gradients
    into other buckets, and where a gradient lies in a bucket decides in which order three or more processes add it up. Without that
    pass the first step after a restart would be rounded differently than the same step of a run that was not stopped.

    Args:
        batch: float32 (N, 3, S, S), of this process's share of a step; its values do not matter.
    """
    if batch.is_cuda:
        model = share_statistics(model)
    network = DistributedDataParallel(model)
    kept = [buffer.clone() for buffer in model.buffers()]
    network.train()(batch).sum().backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
    return network
