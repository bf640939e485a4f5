"""What follows from `teacher.init` and `student.init`, before a command's stages run: preprocessing, and whether the weights fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import ValidationError

from data.settings import UsageError
from data.storage.redact import redacted
from pipeline.core.config import Loaded
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from pipeline.models.initial_weights import (
    FOLLOWED,
    PRETRAIN,
    TEACHER,
    InitialWeights,
    find_source,
    recorded_preprocessing,
)
from pipeline.models.registry import build_model, on_meta

_Role = Literal["teacher", "student"]
_ROLES: tuple[_Role, ...] = ("teacher", "student")  # in this order: the student may follow the teacher


def follow_weights(loaded: Loaded) -> tuple[Loaded, list[str]]:
    """Give teacher and student the preprocessing of the weights that they begin with, in the fields that nobody has set.

    Returns:
        The configuration, and lines that say which values are the weights', and which of those given are others.

    Raises:
        StageError, ModelError: there are no such weights, or their config.json cannot be read.
        UsageError: a value there is out of its field's range, or does not go together with other fields.
    """
    lines = []
    for role in _ROLES:
        if loaded.config.training(role).init is not None and loaded.is_set(f"{role}.init"):
            loaded, line = _follow(loaded, role)
            lines += [line] if line else []
    return loaded, lines


def _follow(loaded: Loaded, role: _Role) -> tuple[Loaded, str]:
    section = loaded.config.training(role)
    recorded, source = _preprocessing(loaded.config, role)
    others = {name: value for name, value in recorded.items() if value != getattr(section, name)}
    changed = {name: value for name, value in others.items() if loaded.is_unset(f"{role}.{name}")}
    given = {
        name: getattr(section, name)
        for name in others
        if name not in changed and section.init not in (TEACHER, PRETRAIN)
    }
    if changed:
        followed = loaded.followed | {f"{role}.{name}" for name in changed}
        loaded = replace(loaded, config=_with(loaded.config, role, changed, source), followed=followed)
    theirs = _plain_fields({name: others[name] for name in given})
    words = [f"{_plain_fields(changed)}, as in {redacted(source)}"] if changed else []
    words += [f"{_plain_fields(given)} as given, though {redacted(source)} has {theirs}"] if given else []
    return loaded, f"{role}: {'; '.join(words)}" if words else ""


def _preprocessing(config: Config, role: _Role) -> tuple[Mapping[str, Any], str]:
    """Field → value, and where it is from."""
    section = config.training(role)
    if section.init in (TEACHER, PRETRAIN):  # may still be to be made
        maker = config.training(section.init)
        return {name: getattr(maker, name) for name in FOLLOWED}, f"stage={section.init}"
    source = find_source(str(section.init), f"{role}.init", config.source_dir)
    return recorded_preprocessing(source, section.model, section.model_args)


def _with(config: Config, role: _Role, changed: Mapping[str, Any], source: str) -> Config:
    fields = config.model_dump()
    try:
        return Config.model_validate(fields | {role: fields[role] | changed})
    except ValidationError as error:
        problem = error.errors()[0]
    words = problem["msg"].removeprefix("Value error, ")
    if problem["loc"]:
        field = str(problem["loc"][1])
        raise UsageError(f"{redacted(source)}: {field}={changed[field]}: {words}; give {role}.{field}=…")
    raise UsageError(f"{role}: {_plain_fields(changed)}, as in {redacted(source)}: {words}")


def _plain_fields(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    """As a command has it."""
    return f"[{','.join(f'{part:g}' for part in value)}]" if isinstance(value, tuple) else str(value)


def require_models(config: Config, layouts: Sequence[Layout], stages: Sequence[str], forced: str | None) -> None:
    """Before anything runs: can teacher and student be built, and do their first weights fit, where their stages are not done?

    Args:
        forced: a stage that starts over, done or not.

    Raises:
        ModelError: no such model, or weights that do not fit.
        StageError: no such weights.
    """
    for role in _ROLES:
        own = layouts[:1] if role == "teacher" else layouts
        if role in stages and (role == forced or any(done_record(layout.folder_of(role)) is None for layout in own)):
            _require_model(config, role, PRETRAIN in stages)


def _require_model(config: Config, role: _Role, pretrains: bool) -> None:
    section = config.training(role)
    rates = section.dropout, section.stochastic_depth
    on_meta(partial(build_model, section.model, 2, section.model_args, *rates))
    if section.init not in (None, TEACHER) and not (section.init == PRETRAIN and pretrains):
        field = f"{role}.init"
        InitialWeights(field, find_source(str(section.init), field, config.source_dir)).check(section, 2)
