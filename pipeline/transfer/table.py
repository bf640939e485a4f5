"""Results of all finished cells: `results.json`, `plot.svg` and the page `transfer.html`, written anew whenever the stage ends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from markupsafe import Markup

from data import storage
from pipeline.core.layout import RESULTS_NAME
from pipeline.core.schema import Config
from pipeline.pages.render import environment
from pipeline.pages.transfer_table import transfer_plot, transfer_section
from pipeline.transfer.cells import Cell, cells_of
from pipeline.transfer.scores import Score, half_width
from pipeline.trials.trial import Trial

PLOT_NAME, PAGE_NAME = "plot.svg", "transfer.html"


def results_of(config: Config, trials: Sequence[Trial]) -> dict[str, Any]:
    """The record of all trials that are done; see `record_of`."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    wanted = {cell.row for cell in cells_of(config)}
    results = [(trial.row, trial.result()) for trial in trials if trial.row in wanted]
    for row, result in results:
        if result is not None:
            found.setdefault(row, []).append(result)
    return record_of(cells_of(config), found, missing=sum(result is None for _, result in results))


def record_of(cells: Sequence[Cell], found: Mapping[str, Sequence[Mapping[str, Any]]], missing: int) -> dict[str, Any]:
    """A row per cell with results, in the order of `cells`; accuracies in per cent.

    Args:
        found: `Cell.row` → a result per seed.
        missing: results that are not there yet.
    """
    rows = [_row(cell, found[cell.row]) for cell in cells if cell.row in found]
    for row in rows:
        column = [other["mean"] for other in rows if (other["set"], other["method"]) == (row["set"], row["method"])]
        row["is_best"] = row["mean"] == max(column)
    return {"missing": missing, "rows": rows}


def _row(cell: Cell, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [Score(tuple(result["right"]), tuple(result["images"])) for result in results]
    return {
        "backbone": cell.backbone,
        "set": cell.data,
        "method": cell.method,
        "top1": [100 * score.top1 for score in scores],
        "mean": 100 * mean(score.top1 for score in scores),
        "half_width": 100 * half_width(scores),
        "mean_per_class": 100 * mean(score.mean_per_class for score in scores),
        "images": sum(scores[0].images),
        "details": list(results),
    }


def write_results(folder: str, record: Mapping[str, Any]) -> None:
    """Write the three files."""
    storage.write_text(storage.join(folder, RESULTS_NAME), json.dumps(record, indent=1) + "\n")
    storage.write_bytes(storage.join(folder, PLOT_NAME), transfer_plot(record))
    storage.write_text(storage.join(folder, PAGE_NAME), _page(record))


def _page(record: Mapping[str, Any]) -> str:
    templates = environment("pipeline.transfer")
    section = transfer_section(record)
    body = Markup(templates.get_template(section.template).render(section.values))
    return templates.get_template("page.html").render(title="Transfer", section=body)
