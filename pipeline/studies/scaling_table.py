"""What a scaling study writes beside the table of all studies: cells with their costs, findings and the paper's plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import pyarrow as pa

from data import storage
from data.tables import write_table
from pipeline.core.schema import Config
from pipeline.models.expected_time import Workload, images_per_s
from pipeline.pages.scaling_plot import FINDINGS_NAME, scaling_plot
from pipeline.studies.rows import Study
from pipeline.studies.scaling import Cell, cells_of, section_of, size_of
from pipeline.studies.scaling_fit import CellResult, Finding, findings
from pipeline.studies.table import RowResult

CELLS_NAME, SCALING_PLOT_NAME = "cells.parquet", "scaling.svg"


def cell_results(config: Config, results: Sequence[RowResult], num_classes: int) -> list[CellResult]:
    """Every cell with its error and its costs, which are counted, and timed here for a moment each."""
    rows = {row.name: row for row in results}
    found = []
    for cell in cells_of(config):
        size = size_of(cell, config, num_classes)
        step_ms, inference_ms = _measure(cell, config, num_classes)
        errors = tuple(100 - top1 for top1 in rows[cell.name].top1)
        found.append(
            CellResult(**asdict(cell), errors=errors, **asdict(size), step_ms=step_ms, inference_ms=inference_ms)
        )
    return found


def _measure(cell: Cell, config: Config, num_classes: int) -> tuple[float, float]:
    """Milliseconds of a training step of one batch, and of one image in a batch of predictions; as the plan's estimate times them."""
    section, device = section_of(cell, config), config.resolved_device()
    step = Workload(cell.name, section.batch_size, 1, True, section, num_classes, config.threads)
    rate = images_per_s(step, device)
    return 1000 * section.batch_size / rate, 1000 / images_per_s(replace(step, trains=False), device)


def write_scaling(folder: str, cells: Sequence[CellResult], study: Study, facts: Mapping[str, int]) -> list[Finding]:
    """Write `cells.parquet`, `findings.json` and `scaling.svg`; return the findings.

    Args:
        study: whose rows are the cells, in their order; what each changes is written beside it.
        facts: of all trainings: `images` in an epoch, `batch_size`, `num_classes`; for stage=advise.
    """
    found = findings(cells)
    write_table(storage.join(folder, CELLS_NAME), pa.Table.from_pylist([asdict(cell) for cell in cells]))
    rows = [asdict(cell) | {"changes": dict(row.changes)} for cell, row in zip(cells, study.rows, strict=True)]
    content = {**facts, "cells": rows, "findings": [asdict(finding) for finding in found]}
    storage.write_text(storage.join(folder, FINDINGS_NAME), json.dumps(content, indent=1) + "\n")
    storage.write_bytes(storage.join(folder, SCALING_PLOT_NAME), scaling_plot(rows))
    return found


def describe_findings(found: Sequence[Finding]) -> str:
    """A line per finding."""
    return "\n".join(f"{finding.question}{_value(finding)}: {finding.answer}" for finding in found)


def _value(finding: Finding) -> str:
    if finding.value is None:
        return ""
    interval = "" if finding.low is None else f" ({finding.low:.2f} to {finding.high:.2f})"
    return f" {finding.value:.2f}{interval}"
