"""The reference of all fields, from their schema: `python -m pipeline.core.reference > docs/fields.md`."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic.fields import FieldInfo

from pipeline.core.schema import (
    BY_DIGEST,
    RESUMABLE,
    RUNTIME,
    Config,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

_INTRODUCTION = """# Fields of the configuration

Made from `pipeline/core/schema.py` by `python -m pipeline.core.reference > docs/fields.md`; `python -m pipeline.run --help` prints
the same. Defaults, then the YAML file or name given as `config=`, then words of the command, as in `teacher.epochs=10`: the later
one wins.
A run directory remembers the configuration of each command whose inputs were found, so that later ones need `run_dir=` alone; with
`config=` named again, the remembered words of earlier commands still win, and are printed. Variables (`${oc.env:X}`, `${other.field}`)
are filled in where a command gives them and are remembered as they were typed; what a run directory itself says is never filled in.

Fields marked ○ change how fast something runs, never what comes out, and may change at any time; those marked ◐ may change while their
stage is not done. Of those marked ● and of `data`, what they name counts, not the name: shards may move. Any other belongs to what a
stage's output is made from: another value is refused, with both values, until `force=true` or another `run_dir=`.
"""
_MARKS = (("○", RUNTIME), ("◐", RESUMABLE), ("●", BY_DIGEST))


def reference() -> str:
    """All of docs/fields.md."""
    sections = {name: kind for name, info in Config.model_fields.items() if (kind := _section(info)) is not None}
    parts = [_INTRODUCTION, _part("The run", Config, "", skip=set(sections))]
    shared = set(TrainConfig.model_fields)
    for name, section in sections.items():
        if section in (TeacherConfig, StudentConfig):
            parts.append(_part(f"`{name}` alone", section, f"{name}.", skip=shared))
        else:
            parts.append(_part(f"`{name}`", section, f"{name}."))
    parts.append(_part("`teacher` and `student`: each has all of these", TrainConfig, "teacher."))
    return "\n".join(parts)


def _part(title: str, section: type[Section], prefix: str, skip: set[str] | frozenset[str] = frozenset()) -> str:
    rows = [f"| {row}" for row in _rows(section, prefix, skip)]
    words = inspect.cleandoc(section.__doc__ or "")
    return "\n".join([f"## {title}", "", words, "", "| field | default | values | |", "|---|---|---|---|", *rows, ""])


def _rows(section: type[Section], prefix: str, skip: set[str] | frozenset[str] = frozenset()) -> Iterator[str]:
    for name, info in section.model_fields.items():
        inner = _section(info)
        if name in skip:
            continue
        if inner is not None:
            yield from _rows(inner, f"{prefix}{name}.")
        else:
            mark = "".join(f" {sign}" for sign, extra in _MARKS if info.json_schema_extra == extra)
            default = f"`{_plain(info.get_default())}`"
            cells = (f"`{prefix}{name}`{mark}", default, _values(info), info.description or "")
            yield " | ".join(cells).strip() + " |"


def _section(info: FieldInfo) -> type[Section] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return _plain(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value) or '""'


def _values(info: FieldInfo) -> str:
    """What is allowed, in a few signs."""
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
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, "mapping" if origin is dict else re.sub(r"<class '(.*)'>", r"\1", str(annotation)))


def _number(value: float) -> str:
    return f"{value:,g}"


if __name__ == "__main__":
    print(reference(), end="")
