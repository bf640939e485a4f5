"""The layers of a configuration: which layer a value is from, and which variables (`${…}`) are filled in.

Variables in a command's YAML file and words are filled in: `${oc.env:X}`, `${other.field}`. Those in a run directory's config.yaml are
not, or whoever made it could send this machine's environment away in URLs. That file keeps the text as typed, so that no secret of an
environment variable is written to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

_INTERPOLATION = re.compile(r"(\\*)\$\{")
_RESOLVER = re.compile(r"\$\{[^{}]*(:|\$\{)")  # `${name:…}`; a name may itself be filled in
DEFAULT = "has its default"


@dataclass(frozen=True)
class Layer:
    """Some fields of a configuration.

    Attributes:
        origin: where they are from, with a verb: `is from mine.yaml`.
        fields: nested, variables not filled in.
    """

    origin: str
    fields: DictConfig


def literal(container: Any, resolvers_only: bool = False) -> Any:
    """Escape variables in nested values, so that omegaconf keeps them as text; with `resolvers_only`, only variables that a resolver
    fills in, such as `${oc.env:X}`."""
    if isinstance(container, dict):
        return {key: literal(value, resolvers_only) for key, value in container.items()}
    if isinstance(container, list):
        return [literal(value, resolvers_only) for value in container]
    if not isinstance(container, str) or (resolvers_only and not _RESOLVER.search(container)):
        return container
    return _INTERPOLATION.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + "${", container)


def as_container(fields: DictConfig, resolve: bool = False) -> Any:
    """Convert to nested dicts and lists."""
    return OmegaConf.to_container(fields, resolve=resolve)


def merged(layers: Sequence[Layer]) -> DictConfig:
    """Merge layers; later ones win, and an empty mapping (`teacher.model_args={}`) clears that of an earlier one.

    Raises omegaconf's errors and TypeError for a layer that does not fit.
    """
    result = OmegaConf.create({})
    for layer in layers:
        cleared = OmegaConf.create(_cleared(as_container(result), as_container(layer.fields)))
        total = OmegaConf.merge(cleared, layer.fields)
        assert isinstance(total, DictConfig)
        result = total
    return result


def _cleared(values: Any, later: Any) -> Any:
    """Nested values without the mappings that are empty in `later`."""
    if not (isinstance(values, dict) and isinstance(later, dict)):
        return values
    return {
        key: _cleared(value, later[key]) if key in later else value
        for key, value in values.items()
        if later.get(key) != {}
    }


def origin_of(layers: Sequence[Layer], field: str) -> str:
    """The `Layer.origin` of a dotted field's value; of a list or mapping, that of the last layer that sets a part or clears it."""
    path = re.split(r"[.\[]", field.replace("]", ""))
    clearing = ""
    for layer in reversed(layers):
        values = as_container(layer.fields)
        if _has(values, path):
            return clearing or layer.origin
        clearing = clearing or layer.origin * _clears(values, path)
    return DEFAULT


def sets(layer: Layer, field: str) -> bool:
    """Whether a layer sets a dotted field."""
    return _has(as_container(layer.fields), field.split("."))


def _has(container: Any, path: Sequence[str]) -> bool:
    """Whether the nested values set the field, a part of it, or a list that contains it."""
    for part in path:
        if not isinstance(container, dict):
            return True  # a list is set by one layer
        if part not in container:
            return False
        container = container[part]
    return container != {}


def _clears(container: Any, path: Sequence[str]) -> bool:
    """Whether the nested values have an empty mapping as the field, or as a mapping that contains it."""
    for part in path:
        if not isinstance(container, dict) or part not in container:
            return False
        container = container[part]
        if container == {}:
            return True
    return False


def as_typed(values: Any, typed: Any) -> Any:
    """Validated values, but text as typed where it has resolver variables in it."""
    if isinstance(values, dict) and isinstance(typed, dict):
        return {key: as_typed(value, typed.get(key)) for key, value in values.items()}
    if isinstance(values, list) and isinstance(typed, list) and len(values) == len(typed):
        return [as_typed(value, some) for value, some in zip(values, typed, strict=True)]
    if not isinstance(typed, str) or not _RESOLVER.search(typed) or not isinstance(values, str | list | dict):
        return values
    return [typed] if isinstance(values, list) else typed
