"""A study as plain data: rows that each change another row's configuration, with the published results; the trials it makes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from data import storage
from data.settings import UsageError
from pipeline.core.config import config_of
from pipeline.core.schema import Config
from pipeline.trials.trial import Experiment, Trial


@dataclass(frozen=True)
class FromRun:
    """A placeholder for the value of the run's configuration in the same field, times `factor`."""

    factor: float = 1.0


@dataclass(frozen=True)
class Row:
    """One configuration of a study.

    Attributes:
        changes: dotted field → value, `FromRun`, or a function: the run's fields (nested mappings) → value.
        published: top-1 in the paper, in per cent.
        of: the earlier row that this one changes and is compared with; None: the study's base.
        needs: the earlier row whose outputs this one uses, with the same seed; None: it starts from scratch.
        finding: the paper's result in words, where it gives no figure.
    """

    name: str
    changes: Mapping[str, Any]
    published: float | None = None
    of: str | None = None
    needs: str | None = None
    finding: str = ""


@dataclass(frozen=True)
class Study:
    """Rows over a base: the run's configuration with a few changes.

    Attributes:
        source: of the published figures.
        skip_unchanged: skip a row that changes nothing in the run's configuration; else refuse the study.
    """

    name: str
    source: str
    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    skip_unchanged: bool = False


def additive(*rows: Row) -> tuple[Row, ...]:
    """Return the rows, each changing the one before it."""
    return (rows[0], *(replace(row, of=before.name) for before, row in pairwise(rows)))


def row_configs(study: Study, config: Config) -> dict[str, Config]:
    """Return the configuration of every row of `rows_for`, by name. Raises UsageError as `rows_for`."""
    fields, _ = _fields(study, config)
    return {name: _validated(study, name, values) for name, values in fields.items()}


def rows_for(study: Study, config: Config) -> tuple[Row, ...]:
    """Return the rows without skipped ones; a row compared with a skipped row is compared with that row's equal instead.

    Raises UsageError when a row changes nothing in this configuration, or a value is invalid.
    """
    fields, instead = _fields(study, config)
    rows = [row for row in study.rows if row.name in fields]
    return tuple(replace(row, of=instead.get(row.of or "", row.of)) for row in rows)


def _fields(study: Study, config: Config) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return fields by row, and for each skipped row the row that it equals."""
    run = config.model_dump()
    base = _changed(run, study.base, run)
    fields: dict[str, dict[str, Any]] = {}
    instead: dict[str, str] = {}
    for row in study.rows:
        of = instead.get(row.of, row.of) if row.of is not None else None
        before = base if of is None else fields[of]
        after = _changed(before, row.changes, run)
        if of is not None and row.changes and after == before:
            if not study.skip_unchanged:
                raise UsageError(_no_change(study, row, before))
            instead[row.name] = of
        else:
            fields[row.name] = after
    return fields, instead


def _no_change(study: Study, row: Row, before: Mapping[str, Any]) -> str:
    values = ", ".join(f"{field}={_get(before, field)!r}" for field in row.changes)
    return (
        f"study {study.name}, row {row.name!r}: it changes nothing, because the configuration already has {values}; "
        "set the value that the row should add"
    )


def _changed(before: Mapping[str, Any], changes: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    after = copy.deepcopy(dict(before))
    for field, value in changes.items():
        *sections, name = field.split(".")
        section = after
        for part in sections:
            section = section[part]
        section[name] = _value(run, field, value)
    return after


def _value(run: Mapping[str, Any], field: str, value: Any) -> Any:
    if isinstance(value, FromRun):
        return _get(run, field) * value.factor
    return copy.deepcopy(value(run)) if callable(value) else value


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


def no_input_noise(section: str) -> dict[str, Any]:
    """Changes that turn off a section's input noise. Crop and flip remain, as in ResNet-RS's baseline."""
    names = ("num_ops", "rotation", "zoom", "translate", "shear", "brightness", "contrast", "cutout")
    return {f"{section}.mixup": 0.0} | {f"{section}.augment.{name}": 0 for name in names}


def seeds_of(config: Config) -> Iterable[int]:
    """Return the seeds that every row is trained with."""
    return range(config.seed, config.seed + config.ablate.seeds)


def trials_of(study: Study, config: Config, folder: str, experiment: Experiment) -> list[Trial]:
    """Return all rows with the first seed, then with the next: an interrupted study has complete seeds.

    Raises UsageError as `row_configs`.
    """
    trials = []
    rows, configs = rows_for(study, config), row_configs(study, config)
    for seed in seeds_of(config):
        sources: dict[str, tuple[str, ...]] = {}
        for row in rows:
            seeded = configs[row.name].model_copy(update={"seed": seed})
            trial_folder = storage.join(folder, _slug(row.name), f"seed-{seed}")
            below = sources[row.needs] if row.needs else ()
            sources[row.name] = (trial_folder, *below)
            trials.append(Trial(row.name, seed, seeded, trial_folder, experiment.fingerprint(seeded), below))
    return trials


def _slug(row: str) -> str:
    return re.sub(r"\W+", "_", row).strip("_").lower()
