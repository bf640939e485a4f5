"""A study as plain data: rows that each change one thing of another row's configuration, and what was published of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from data.settings import UsageError
from pipeline.config import config_of
from pipeline.fields import Config


@dataclass(frozen=True)
class Own:
    """In place of a value: the one that the run's configuration has in this field, times a factor."""

    times: float = 1.0


@dataclass(frozen=True)
class Row:
    """One configuration of a study.

    Attributes:
        changes: dotted field → value or `Own`.
        published: top-1 of the row in the paper, in per cent.
        of: the earlier row that it changes and is compared with; None changes the study's base.
    """

    name: str
    changes: Mapping[str, Any]
    published: float | None = None
    of: str | None = None


@dataclass(frozen=True)
class Study:
    """Rows over a base, which is the run's configuration with a few changes.

    Attributes:
        source: where the published figures are from.
    """

    name: str
    source: str
    base: Mapping[str, Any]
    rows: tuple[Row, ...]


def additive(*rows: Row) -> tuple[Row, ...]:
    """Each row changes the one before it."""
    return (rows[0], *(replace(row, of=before.name) for before, row in pairwise(rows)))


def row_configs(study: Study, config: Config) -> dict[str, Config]:
    """The configuration of every row, by name.

    Raises:
        UsageError: a row that changes nothing in this configuration, or a value that does not fit.
    """
    own = config.model_dump()
    base = _changed(own, study.base, own)
    fields: dict[str, dict[str, Any]] = {}
    for row in study.rows:
        before = base if row.of is None else fields[row.of]
        fields[row.name] = _changed(before, row.changes, own)
        if row.of is not None and fields[row.name] == before:
            raise UsageError(_no_change(study, row, before))
    return {name: _validated(study, name, values) for name, values in fields.items()}


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
        section[name] = _get(own, field) * value.times if isinstance(value, Own) else value
    return after


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
