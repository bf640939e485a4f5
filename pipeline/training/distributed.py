"""Communication between the ranks of a training. With a single process, nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def sum_over_ranks(*values: float) -> list[float]:
    """Sum each value over the ranks, in one message; all ranks get the same float64 sums."""
    if not distributed.is_initialized():
        return list(values)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return [float(value) for value in sums.tolist()]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_statistics(model: nn.Module) -> nn.Module:
    """Replace batch norms by ones with statistics over the images of all ranks. Parameters and buffers stay the same tensors.

    timm's converter, because torch's drops the activation that many timm models have inside the norm layer.
    """
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted


def share_gradients(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """Wrap the model in DDP, which averages gradients over the ranks.

    Run and discard one backward pass: DDP rebuilds its buckets after the first. A gradient's place in a bucket decides in which
    order three or more ranks add it, so without that pass the first step after a restart would be rounded differently than in a
    run that was not stopped. Model and statistics stay as they are.

    Args:
        batch: float32 (N, 3, S, S), with this rank's number of images per micro-batch; any values.
    """
    network = DistributedDataParallel(model)
    before = [buffer.clone() for buffer in model.buffers()]
    network.train()(batch).sum().backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return network
