"""The fields of the configuration as text: for --help, and for docs (`python -m pipeline.core.reference > docs/fields.md`)."""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo

from data.settings import run_command
from pipeline.core.schema import (
    BY_DIGEST,
    CPU_NUMERICS,
    REPORTING,
    RESUMABLE,
    RUNTIME,
    Config,
    Section,
    TrainConfig,
    fields_of,
)

_INTRODUCTION = """# Fields of the configuration

`python -m pipeline.core.reference > docs/fields.md` writes this page from `pipeline/core/schema/`; `python -m pipeline.run --help`
prints the same. Defaults, then `recipe=` ([recipe.md](recipe.md#recipes-for-your-own-images)), then the YAML file or name given as
`config=`, then words of the command, as in `teacher.epochs=10`: the later one wins.
A run directory remembers the configuration of each command whose inputs were found, so that later commands need only `run_dir=`. When
`config=` is given again, the remembered words of earlier commands still win, and are printed. Variables (`${oc.env:X}`,
`${other.field}`) are filled in where a command gives them, and remembered as typed; those in a run directory's own config.yaml are
never filled in.

Fields marked ○ change how fast a stage runs or how often it measures and logs, never weights or labels, and may change at any time.
Those marked ◐ may change while their stage is not done, those marked ◑ on GPUs (on CPUs they change the rounding). Fields marked ● and
those of `data` count by the content they name: shards may move. Another value of any other field makes a stage refuse, with both
values, until `force=true` or another `run_dir=` is given.
"""
_MARKS = (("○", RUNTIME), ("○", REPORTING), ("◐", RESUMABLE), ("◑", CPU_NUMERICS), ("●", BY_DIGEST))


def reference() -> str:
    """All of docs/fields.md."""
    sections = {name: type(value) for name, value in Config() if isinstance(value, Section)}
    parts = [
        _INTRODUCTION,
        _part("The run", Config, "", [name for name in Config.model_fields if name not in sections]),
    ]
    for name, section in sections.items():
        if issubclass(section, TrainConfig):
            parts.append(_part(f"`{name}` alone", section, f"{name}.", _own_fields(section)))
        else:
            parts.append(_part(f"`{name}`", section, f"{name}."))
    parts.append(_part("`pretrain`, `teacher` and `student`: each has all of these", TrainConfig, "teacher."))
    return "\n".join(parts)


def _own_fields(section: type[TrainConfig]) -> list[str]:
    """Dotted fields that other trainings lack, or that have another default there."""
    of_all = dict(fields_of(TrainConfig))
    return [name for name, info in fields_of(section) if name not in of_all or info.default != of_all[name].default]


def describe_fields() -> Iterator[str]:
    """Yield `field=default  meaning` for every field, nested ones dotted."""
    for name, info in fields_of(Config):
        line = f"{name}={_plain(info.get_default())}".ljust(44) + f" {info.description or ''}"
        yield line.rstrip()


def _part(title: str, section: type[Section], prefix: str, only: Collection[str] | None = None) -> str:
    """A heading, the section's docstring, and a table of its fields (of those in `only`)."""
    rows = [
        _row(name, info)
        for name, info in fields_of(section, prefix)
        if only is None or name.removeprefix(prefix) in only
    ]
    words = inspect.cleandoc(section.__doc__ or "")
    return "\n".join([f"## {title}", "", words, "", "| field | default | values | |", "|---|---|---|---|", *rows, ""])


def _row(name: str, info: FieldInfo) -> str:
    mark = "".join(f" {sign}" for sign, extra in _MARKS if info.json_schema_extra == extra)
    cells = (f"`{name}`{mark}", f"`{_plain(info.get_default())}`", _values(info), info.description or "")
    return "| " + " | ".join(cells).strip() + " |"


def _plain(value: Any) -> str:
    """A default as a user types it."""
    if isinstance(value, tuple):
        return _plain(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _values(info: FieldInfo) -> str:
    """The allowed values: `integer ≥ 1`."""
    bounds = {sign: getattr(entry, name) for entry in info.metadata for name, sign in _SIGNS if hasattr(entry, name)}
    limits = " ".join(f"{sign} {_number(value)}" for sign, value in bounds.items())
    return f"{_kind(info.annotation)} {limits}".strip()


_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def _kind(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "mapping"
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple:
        return "list of numbers" if Ellipsis in arguments else f"{len(arguments)} numbers"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, "mapping" if origin is dict else re.sub(r"<class '(.*)'>", r"\1", str(annotation)))


def _number(value: float) -> str:
    return f"{value:,g}"


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""

    def print_reference() -> None:
        print(reference(), end="")

    return run_command(print_reference, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
