"""A study's results beside the published ones: a table on screen, `results.json`, `plot.svg`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from data import storage
from pipeline.core.layout import RESULTS_NAME
from pipeline.pages.plots import study_rows
from pipeline.studies.rows import Row, Study
from pipeline.trials.trial import Trial

PLOT_NAME = "plot.svg"


@dataclass(frozen=True)
class RowResult:
    """A row's results, in per cent and percentage points.

    Attributes:
        of: the row it is compared with.
        top1: by seed.
        spread: standard deviation over seeds; None with one seed.
        change: mean over seeds of the difference to row `of`; None without one.
        change_error: standard error of that mean.
        finding: the paper's result in words.
        details: by seed, the experiment's result.
    """

    name: str
    of: str | None
    top1: tuple[float, ...]
    mean: float
    spread: float | None
    change: float | None
    change_error: float | None
    published: float | None
    published_change: float | None
    finding: str
    details: tuple[Mapping[str, Any], ...]


def row_results(rows: Sequence[Row], trials: Sequence[Trial]) -> list[RowResult]:
    """Return the results of all rows; every trial must be done."""
    found = _by_row(trials)
    top1 = {row: tuple(100 * result["top1"] for result in results) for row, results in found.items()}
    published = {row.name: row.published for row in rows}
    results = []
    for row in rows:
        pairs = zip(top1[row.name], top1[row.of], strict=True) if row.of else ()
        differences = [ours - before for ours, before in pairs]
        before = published[row.of] if row.of else None
        results.append(
            RowResult(
                name=row.name,
                of=row.of,
                top1=top1[row.name],
                mean=mean(top1[row.name]),
                spread=_spread(top1[row.name]),
                change=mean(differences) if differences else None,
                change_error=None if (spread := _spread(differences)) is None else spread / len(differences) ** 0.5,
                published=row.published,
                published_change=None if before is None or row.published is None else row.published - before,
                finding=row.finding,
                details=tuple(found[row.name]),
            )
        )
    return results


def _by_row(trials: Iterable[Trial]) -> dict[str, list[Mapping[str, Any]]]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for trial in trials:
        result = trial.result()
        assert result is not None, f"{trial.folder} is not done"
        rows.setdefault(trial.row, []).append(result)
    return rows


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def describe(study: Study, results: Sequence[RowResult]) -> str:
    """Format the table. "±" is the standard deviation over seeds for a top-1, the standard error for a change."""
    head = ("", "top-1 %", "change", "published", "change", "compared with")
    cells = [head, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, f"published: {study.source}"])


def _cells(result: RowResult) -> tuple[str, ...]:
    ours = f"{result.mean:.2f}{_plus_minus(result.spread)}"
    change = "" if result.change is None else f"{result.change:+.2f}{_plus_minus(result.change_error)}"
    published = "" if result.published is None else f"{result.published:.1f}"
    published_change = result.finding if result.published_change is None else f"{result.published_change:+.1f}"
    return result.name, ours, change, published, published_change, result.of or ""


def _plus_minus(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def write_results(folder: str, study: Study, seeds: Iterable[int], results: Sequence[RowResult]) -> None:
    """Write `results.json` and `plot.svg`."""
    record = {
        "study": study.name,
        "source": study.source,
        "seeds": list(seeds),
        "rows": [asdict(row) for row in results],
    }
    storage.write_text(storage.join(folder, RESULTS_NAME), json.dumps(record, indent=1) + "\n")
    plot = study_rows([row.name for row in results], [row.top1 for row in results], [row.published for row in results])
    storage.write_bytes(storage.join(folder, PLOT_NAME), plot)
