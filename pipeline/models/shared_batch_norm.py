"""Batch norm over the images of all training processes: what one process computes that has the whole batch.

    forward    mean, variance and count of this process's values ── one gather ──► those of all values ──► normalize
    backward   sums of gradients, and of gradients × values      ── one sum ─────► gradients of this process's values

torch's SyncBatchNorm reads on the host which processes had images, so every layer waits for the device and ends a graph of
torch.compile; and it runs on GPUs alone. Here every process has images, all sizes are fixed, and nothing is read.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def share_statistics(model: nn.Module) -> None:
    """Let the model's batch norms have statistics over the images of all processes of torch's default group.

    Parameters, buffers, hooks and children stay the same objects, and a state dict's names the same. timm's norms keep the activation
    that they contain.
    """
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):
            module.__class__ = SharedBatchNormAct  # type: ignore[assignment]  # which is not one, for isinstance
        elif isinstance(module, _BatchNorm):
            module.__class__ = SharedBatchNorm


class SharedBatchNorm(_BatchNorm):
    """Any batch norm of torch. In eval mode it computes as before; `share_statistics` makes it.

    Running variances are unbiased, as torch's are. `momentum` must be a number, as `set_bn_momentum` sets it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) → (N, C, …), normalized per channel."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            mean, var, counts = _statistics(input)
            self._update(mean, var, counts.sum())
        output: Tensor = _Normalize.apply(input, self.weight, self.bias, mean, var, counts, self.eps)
        return output

    def _update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Move the running statistics, if tracked, towards those of a batch: `var` is biased, of `count` values per channel."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None, "set_bn_momentum sets it"
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)


class SharedBatchNormAct(SharedBatchNorm):
    """timm's batch norm, with dropout (`drop`) and an activation (`act`) after it."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W), normalized per channel and activated."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means and biased variances over all processes, (C,), and the number of values that each of them has per channel, (world, 1).

    Variances are combined without cancellation: within processes, and between their means (Chan et al. 1979, eq. 2.1).
    """
    mean, var = _own_statistics(x)
    own = torch.cat([mean, var, mean.new_full((1,), x.numel() // len(mean))])
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    means, variances, counts = torch.stack(found).split([len(mean), len(mean), 1], 1)
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), counts


class _Normalize(torch.autograd.Function):
    """(x − mean) / √(var + eps) × weight + bias, whose gradient goes through mean and variance to the values of all processes.

    The gradients of weight and bias are those of this process's values: DDP averages them, as all others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, counts: Tensor, eps: float
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, mean, var, counts)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, counts = ctx.saved_tensors
        (gradient,), invstd = gradients, (var + ctx.eps).rsqrt()
        own = _own_sums(gradient, x, mean, invstd, weight)
        total = own.clone()
        distributed.all_reduce(total)
        of_input = _input_gradient(gradient, x, mean, invstd, weight, total, counts)
        of_weight, of_bias = (None, None) if weight is None else (own[1] * invstd, own[0])
        return of_input, of_weight, of_bias, None, None, None, None


# On GPUs, the three functions below call the kernels of torch's SyncBatchNorm. Compiled, they are fused with what is around them.


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def _own_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,), of this process's values: float32, or float64 of float64."""
    if _has_kernels(x):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(_exact(x), _all_but_channels(x), correction=0)
    return mean, var


def _own_sums(gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None) -> Tensor:
    """Sums over this process's values of the gradient, and of the gradient × (x − mean), (2, C)."""
    if _has_kernels(x):
        sums = torch.batch_norm_backward_reduce(gradient, x, mean, invstd, weight, True, False, False)
        return torch.stack(sums[:2])
    dims, exact = _all_but_channels(x), _exact(gradient)
    return torch.stack([exact.sum(dims), (exact * (_exact(x) - _per_channel(mean, x))).sum(dims)])


def _input_gradient(
    gradient: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, counts: Tensor
) -> Tensor:
    """The gradient of x, whose sums over all processes are `sums` (arXiv 1502.03167, section 3)."""
    if _has_kernels(x):
        of_all = sums[0], sums[1], counts.to(torch.int32)
        return torch.batch_norm_backward_elemt(gradient, x, mean, invstd, weight, *of_all)
    first, second = sums / counts.sum()
    scale = invstd if weight is None else invstd * weight
    through_var = (_exact(x) - _per_channel(mean, x)) * _per_channel(second * invstd.square(), x)
    return ((_exact(gradient) - _per_channel(first, x) - through_var) * _per_channel(scale, x)).to(x.dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) values in the shape that broadcasts over x."""
    return values.view(-1, *[1] * (x.dim() - 2))
