"""Count the memory of a model's passes on any machine: on fake tensors, which have shapes and types, but no values.

    training step, at its peak:  activations kept for the backward pass + what is alive for a moment + weights cast to bf16
    forward pass, at its peak:   the largest tensors that are alive together + weights cast to bf16

The peak over n images is a maximum of straight lines, one per operation. So the chord from no images (cast weights, and one gradient)
to the counted number is nowhere below it. Not counted: workspaces of libraries, and what an allocator holds unused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.registry import on_meta

_COUNTED = 4096  # images of the counted pass
_FLOAT32_ON_GPU = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.log_softmax, torch.log_softmax)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a pass over a batch, beyond those of float32 weights, gradients and the batch itself.

    Attributes:
        kept_per_image: activations between the forward and the backward pass.
        per_image, fixed: at the peak.
        weights: float32 parameters and buffers.
        trained: parameters that get gradients.
    """

    kept_per_image: float
    per_image: float
    fixed: float
    weights: int
    trained: int

    def peak(self, images: int) -> int:
        """Bytes at the peak of a pass over 1 to 4,096 images."""
        return round(self.per_image * images + self.fixed)


def count_pass(build: Callable[[], nn.Module], view_shape: int | Sequence[int], bf16: bool, trains: bool) -> PassMemory:
    """Count a forward and backward pass, or a forward pass alone.

    Args:
        build: makes the model, in training or eval mode, frozen and checkpointed as it will be used; called on the meta device.
        view_shape: of a sample: (3, S, S), of clips (frames, 3, S, S); S alone: of an image.
        bf16: under autocast.
        trains: with a backward pass.

    Raises:
        RuntimeError: the model's operations depend on values, so they cannot be counted.
    """
    model = on_meta(build)
    parameters = list(model.parameters())
    kept, peak = _count(model, view_shape, bf16, trains)
    casts = 2 * sum(parameter.numel() for parameter in parameters) if bf16 else 0
    fixed = casts + (_largest_gradient(parameters, bf16) if trains else 0)
    return PassMemory(
        kept_per_image=max(0, kept - casts) / _COUNTED,
        per_image=(peak - fixed) / _COUNTED,
        fixed=fixed,
        weights=_bytes([*parameters, *model.buffers()]),
        trained=_bytes(parameter for parameter in parameters if parameter.requires_grad),
    )


def _largest_gradient(parameters: Sequence[nn.Parameter], bf16: bool) -> int:
    """Bytes of the largest weight's gradient while it is made: under autocast first in bf16."""
    return (6 if bf16 else 4) * max((parameter.numel() for parameter in parameters), default=0)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _count(model: nn.Module, view_shape: int | Sequence[int], bf16: bool, trains: bool) -> tuple[int, int]:
    """Bytes alive after the forward pass over `_COUNTED` images, and at the peak."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        *frames, side = [view_shape] if isinstance(view_shape, int) else [*view_shape[:-3], view_shape[-1]]
        batch = torch.empty(_COUNTED, *frames, getattr(model, "in_chans", 3), side, side)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with _LiveBytes([batch, *model.parameters(), *model.buffers()]) as live, torch.set_grad_enabled(trains):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), _FloatNorms() if bf16 else nullcontext():
                outputs = model(batch)
            kept = live.now
            if trains:
                outputs.float().square().mean().backward()
    return kept, live.peak


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, until they are freed."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        """`others`: tensors that do not count."""
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        identity, size = storage._cdata, storage.nbytes()
        if identity not in self._seen:
            self._seen.add(identity)
            weakref.finalize(storage, self._remove, identity, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _remove(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.now -= size


class _FloatNorms(TorchFunctionMode):
    """Normalizations and softmax in float32, as CUDA's autocast has them and the CPU's has not."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _FLOAT32_ON_GPU and args:
            args = (args[0].float(), *args[1:])
        return function(*args, **(kwargs or {}))
