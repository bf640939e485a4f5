"""Communication between the ranks of a training. With a single process, nothing is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The processes of a training, as one of them sees them; `join_ranks` makes it.

    Messages go from host to host (gloo), also between GPUs' processes, so that none waits for what the devices have still to do.
    """

    rank: int = 0
    world: int = 1
    group: distributed.ProcessGroup | None = None  # None: torch's default group, if any

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.world == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in found.tolist()]

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean of each value over the ranks, the same on all. In rank order: so that it doesn't depend on the number of values.

        Args:
            values: float64 (N,), on the CPU.
        """
        if self.world == 1:
            return [float(value) for value in values.tolist()]
        parts = [torch.empty_like(values) for _ in range(self.world)]
        distributed.all_gather(parts, values, group=self.group)
        return [sum(of_ranks) / self.world for of_ranks in zip(*(part.tolist() for part in parts), strict=True)]

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, rank by rank, for a loss over the whole batch, which every rank computes: (N, …) → (N · world, …).

        Only a rank's own rows have a gradient, times `world`. DDP averages it over the ranks, which gives the gradient of that one
        loss with respect to the weights. Nothing is sent in the backward pass.

        Args:
            rows: as many on every rank, on the training's device.
        """
        if self.world == 1:
            return rows
        gathered: torch.Tensor = _GatherRows.apply(rows, self.rank, self.world)
        return gathered

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value, group=self.group)
        return values


class _GatherRows(torch.autograd.Function):
    """See `Ranks.gather_rows`."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, rank: int, world: int) -> torch.Tensor:
        context.rank, context.world = rank, world
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world)]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].chunk(context.world)[context.rank] * context.world, None, None


def join_ranks() -> Ranks:
    """This process and its peers. Called by all of them at once."""
    if not distributed.is_initialized():
        return Ranks()
    group: Any = None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size(), group)


def share_gradients(model: nn.Module, batch: torch.Tensor) -> nn.Module:
    """Wrap the model, in training mode, in DDP, which averages gradients over the ranks.

    Run and discard one backward pass: DDP rebuilds its buckets after the first. A gradient's place in a bucket decides in which
    order three or more ranks add it, so without that pass the first step after a restart would be rounded differently than in a
    run that was not stopped. Model and statistics stay as they are.

    Args:
        batch: float32 (N, 3, S, S), with the shape and memory format of a micro-batch, for which a model is compiled; any values.
    """
    network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # statistics are equal; torch 2.14 renames the argument
    before = [buffer.clone() for buffer in model.buffers()]
    network(batch).sum().backward()
    network.zero_grad(set_to_none=False)
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
    return network
