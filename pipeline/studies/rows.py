"""A study as plain data: rows that each change one thing of another row's configuration, and what was published of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from data.settings import UsageError
from pipeline.core.config import config_of
from pipeline.core.schema import Config


@dataclass(frozen=True)
class Own:
    """In place of a value: the one that the run's configuration has in this field, times a factor."""

    times: float = 1.0


@dataclass(frozen=True)
class Row:
    """One configuration of a study.

    Attributes:
        changes: dotted field → value, `Own`, or a function of the run's own fields (nested mappings) that gives the value.
        published: top-1 of the row in the paper, in per cent.
        of: the earlier row that it changes and is compared with; None changes the study's base.
        needs: the earlier row whose outputs it builds on, with the same seed; None begins from nothing.
        finding: what the paper says of it, where it gives no figure.
    """

    name: str
    changes: Mapping[str, Any]
    published: float | None = None
    of: str | None = None
    needs: str | None = None
    finding: str = ""


@dataclass(frozen=True)
class Study:
    """Rows over a base, which is the run's configuration with a few changes.

    Attributes:
        source: where the published figures are from.
        leaves_out: rows that change nothing, as the configuration is like that already, are left out; else they are refused.
    """

    name: str
    source: str
    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    leaves_out: bool = False


def additive(*rows: Row) -> tuple[Row, ...]:
    """Each row changes the one before it."""
    return (rows[0], *(replace(row, of=before.name) for before, row in pairwise(rows)))


def row_configs(study: Study, config: Config) -> dict[str, Config]:
    """The configuration of every row of `rows_for`, by name. Raises as that."""
    fields, _ = _fields(study, config)
    return {name: _validated(study, name, values) for name, values in fields.items()}


def rows_for(study: Study, config: Config) -> tuple[Row, ...]:
    """The rows that this configuration has: without those that are left out, in whose place others are compared.

    Raises:
        UsageError: a row that changes nothing in this configuration, or a value that does not fit.
    """
    fields, instead = _fields(study, config)
    rows = [row for row in study.rows if row.name in fields]
    return tuple(replace(row, of=instead.get(row.of or "", row.of)) for row in rows)


def _fields(study: Study, config: Config) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Every row's fields, and for each row that is left out, the one that it is like."""
    own = config.model_dump()
    base = _changed(own, study.base, own)
    fields: dict[str, dict[str, Any]] = {}
    instead: dict[str, str] = {}
    for row in study.rows:
        of = instead.get(row.of, row.of) if row.of is not None else None
        before = base if of is None else fields[of]
        after = _changed(before, row.changes, own)
        if of is not None and row.changes and after == before:
            if not study.leaves_out:
                raise UsageError(_no_change(study, row, before))
            instead[row.name] = of
        else:
            fields[row.name] = after
    return fields, instead


def _no_change(study: Study, row: Row, before: Mapping[str, Any]) -> str:
    values = ", ".join(f"{field}={_get(before, field)!r}" for field in row.changes)
    return (
        f"study {study.name}, row {row.name!r}: it changes nothing, as the configuration has {values} too; "
        "give the value that the row is to bring in"
    )


def _changed(before: Mapping[str, Any], changes: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    after = copy.deepcopy(dict(before))
    for field, value in changes.items():
        *sections, name = field.split(".")
        section = after
        for part in sections:
            section = section[part]
        section[name] = _value(own, field, value)
    return after


def _value(own: Mapping[str, Any], field: str, value: Any) -> Any:
    if isinstance(value, Own):
        return _get(own, field) * value.times
    return copy.deepcopy(value(own)) if callable(value) else value


def _get(fields: Mapping[str, Any], field: str) -> Any:
    value: Any = fields
    for part in field.split("."):
        value = value.get(part)
    return value


def _validated(study: Study, row: str, fields: Mapping[str, Any]) -> Config:
    try:
        return config_of(fields)
    except UsageError as error:
        raise UsageError(f"study {study.name}, row {row!r}: {error}") from None


def seeds_of(config: Config) -> Iterable[int]:
    """The seeds that every row is made with."""
    return range(config.seed, config.seed + config.ablate.seeds)
