"""What a scaling study writes beside the table of all studies: cells with their costs, findings and the paper's plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pyarrow as pa

from data import storage
from data.tables import write_table
from pipeline.core.schema import Config
from pipeline.models.expected_time import Workload, images_per_s
from pipeline.pages.plots import error_against_flops
from pipeline.studies.scaling import Cell, cells_of, model_args, size_of
from pipeline.studies.scaling_fit import CellResult, Finding, findings
from pipeline.studies.table import RowResult

CELLS_NAME, FINDINGS_NAME, SCALING_PLOT_NAME = "cells.parquet", "findings.json", "scaling.svg"


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
    update = {"model": cell.model, "model_args": model_args(cell, config), "image_size": cell.image_size}
    section, device = config.teacher.model_copy(update=update), config.resolved_device()
    step = Workload(cell.name, section.batch_size, 1, True, section, num_classes, config.threads)
    rate = images_per_s(step, device)
    return 1000 * section.batch_size / rate, 1000 / images_per_s(replace(step, trains=False), device)


def write_scaling(folder: str, cells: Sequence[CellResult]) -> list[Finding]:
    """Write `cells.parquet`, `findings.json` and `scaling.svg`; return the findings."""
    found = findings(cells)
    write_table(storage.join(folder, CELLS_NAME), pa.Table.from_pylist([asdict(cell) for cell in cells]))
    content = {"cells": [asdict(cell) for cell in cells], "findings": [asdict(finding) for finding in found]}
    storage.write_text(storage.join(folder, FINDINGS_NAME), json.dumps(content, indent=1) + "\n")
    storage.write_bytes(storage.join(folder, SCALING_PLOT_NAME), error_against_flops(_panels(cells)))
    return found


def describe_findings(found: Sequence[Finding]) -> str:
    """A line per finding."""
    return "\n".join(f"{finding.question}{_value(finding)}: {finding.answer}" for finding in found)


def _value(finding: Finding) -> str:
    if finding.value is None:
        return ""
    interval = "" if finding.low is None else f" ({finding.low:.2f} to {finding.high:.2f})"
    return f" {finding.value:.2f}{interval}"


def _panels(cells: Sequence[CellResult]) -> dict[str, list[tuple[str, list[float], list[float]]]]:
    """Per length of training: per depth and image size a line over widths, as (name, FLOPs, mean errors)."""
    panels: dict[str, list[tuple[str, list[float], list[float]]]] = {}
    for epochs in sorted({cell.epochs for cell in cells}):
        lines: dict[str, list[CellResult]] = {}
        for cell in cells:
            if cell.epochs == epochs:
                lines.setdefault(f"depth {cell.depth}, {cell.image_size} px", []).append(cell)
        panels[f"{epochs:g} epochs"] = [
            (name, [float(c.flops) for c in line], [sum(c.errors) / len(c.errors) for c in line])
            for name, line in lines.items()
        ]
    return panels
