"""Backbone and head of a model: which tensors are the head's, and which of another model's tensors fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from pipeline.models.resnet_rs import ModelError

_COUNTER = "num_batches_tracked"  # of batch norms; old files lack it, and no statistics depend on it


class Match(NamedTuple):
    """The tensors that a model takes of another one's.

    Attributes:
        tensors: by name.
        note: `314 of 316 tensors loaded; head is new: 1000 → 9 classes`.
    """

    tensors: dict[str, Tensor]
    note: str


def head_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that make logits of features: timm's `classifier`, else the last linear layer."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if known:
        return (known,) if isinstance(known, str) else tuple(known)
    return tuple([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:])


def head_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of the head."""
    return {parameter for layer in head_layers(model) for parameter in model.get_submodule(layer).parameters()}


def match(model: nn.Module, state: Mapping[str, Tensor], new_head: bool = False) -> Match:
    """Compare a state dict with a model's, by name and shape.

    Args:
        state: all tensors of the backbone; those of the head are left if they are missing or of another shape.
        new_head: leave those of the head in any case: its classes are others.

    Raises:
        ModelError: the backbones differ; names the first tensor that does.
    """
    own = dict(model.state_dict())
    head = [name for name in own if name.startswith(tuple(f"{layer}." for layer in head_layers(model)))]
    _require_same_backbone({name: own[name] for name in own if name not in head}, state, head)
    is_new = new_head or any(name not in state or state[name].shape != own[name].shape for name in head)
    taken = {name: state[name] for name in own if name in state and not (is_new and name in head)}
    note = f"{len(taken)} of {len(own)} tensors loaded"
    return Match(taken, f"{note}; {_describe_head(own, state, head)}" if is_new else note)


def _require_same_backbone(own: Mapping[str, Tensor], state: Mapping[str, Tensor], head: list[str]) -> None:
    for name, tensor in own.items():
        if name not in state:
            if not name.endswith(_COUNTER):
                raise ModelError(f"it has no tensor {name}, the model has")
        elif state[name].shape != tensor.shape:
            raise ModelError(f"its {name} has the shape {[*state[name].shape]}, the model's {[*tensor.shape]}")
    for name in state:
        if name not in own and name not in head:
            raise ModelError(f"it has a tensor {name}, the model has none")


def _describe_head(own: Mapping[str, Tensor], state: Mapping[str, Tensor], head: list[str]) -> str:
    ours = own[head[-1]].shape[0]
    if head[-1] not in state:
        return f"head is new: {ours} classes"
    theirs = state[head[-1]].shape[0]
    return f"head is new: {theirs} → {ours} classes" if theirs != ours else f"head is new: {ours} other classes"
