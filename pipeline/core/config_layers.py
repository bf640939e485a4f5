"""The layers of a configuration: which one a value is from, and which variables (`${…}`) may be filled in.

What a person gives with a command (a YAML file, words) is filled in: `${oc.env:X}`, `${other.field}`. What a run directory says is
not: whoever made it would otherwise read this machine's environment, in URLs that are fetched. It says what was typed, so that no
secret of an environment variable is written there.
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
        origin: a verb and where they are from, as in `is from mine.yaml`.
        fields: nested; variables are not filled in yet.
    """

    origin: str
    fields: DictConfig


def literal(container: Any, resolvers_only: bool = False) -> Any:
    """Text in nested values so that omegaconf takes its variables for text; with `resolvers_only`, those that ask something outside
    of the configuration, as the environment."""
    if isinstance(container, dict):
        return {key: literal(value, resolvers_only) for key, value in container.items()}
    if isinstance(container, list):
        return [literal(value, resolvers_only) for value in container]
    if not isinstance(container, str) or (resolvers_only and not _RESOLVER.search(container)):
        return container
    return _INTERPOLATION.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + "${", container)


def as_container(fields: DictConfig, resolve: bool = False) -> Any:
    """Plain nested values."""
    return OmegaConf.to_container(fields, resolve=resolve)


def merged(layers: Sequence[Layer]) -> DictConfig:
    """Later ones win. Raises omegaconf's errors and TypeError for one that cannot be laid over what is there."""
    result = OmegaConf.merge(*(layer.fields for layer in layers), {})
    assert isinstance(result, DictConfig)
    return result


def origin_of(layers: Sequence[Layer], field: str) -> str:
    """Of a dotted field's value, as `Layer.origin`; of a list or mapping, of the last layer that changes something in it."""
    path = re.split(r"[.\[]", field.replace("]", ""))
    return next((layer.origin for layer in reversed(layers) if _has(as_container(layer.fields), path)), DEFAULT)


def _has(container: Any, path: Sequence[str]) -> bool:
    """Whether something is said of the field, of a part of it, or of all that it is a part of."""
    for part in path:
        if not isinstance(container, dict):
            return True  # a list: one layer says all of it
        if part not in container:
            return False
        container = container[part]
    return container != {}


def as_typed(values: Any, typed: Any) -> Any:
    """Validated values, with text as it was typed where that has variables left in it (see `literal`)."""
    if isinstance(values, dict) and isinstance(typed, dict):
        return {key: as_typed(value, typed.get(key)) for key, value in values.items()}
    if isinstance(values, list) and isinstance(typed, list) and len(values) == len(typed):
        return [as_typed(value, some) for value, some in zip(values, typed, strict=True)]
    if not isinstance(typed, str) or not _RESOLVER.search(typed) or not isinstance(values, str | list):
        return values
    return [typed] if isinstance(values, list) else typed
