"""The plot of a scaling study, from its cells as `findings.json` has them; for the study and for the report of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from pipeline.pages.plots import Line, Marked, error_against_flops

SCALING, FINDINGS_NAME = "scaling", "findings.json"


def scaling_plot(cells: Sequence[Mapping[str, Any]], models: Sequence[Marked] = ()) -> bytes:
    """Draw error against FLOPs: a panel per length of training, a line over the widths per depth and image size.

    Args:
        cells: with width, depth, image_size, epochs, flops and errors (in per cent, by seed).
        models: to mark in every panel.
    """
    return error_against_flops({f"{epochs:g} epochs": _lines(cells, epochs) for epochs in lengths(cells)}, models)


def lengths(cells: Sequence[Mapping[str, Any]]) -> list[float]:
    """Lengths of training, in epochs."""
    return sorted({cell["epochs"] for cell in cells})


def _lines(cells: Sequence[Mapping[str, Any]], epochs: float) -> list[Line]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        if cell["epochs"] == epochs:
            lines.setdefault(f"depth {cell['depth']}, {cell['image_size']} px", []).append(cell)
    return [
        (name, [cell["flops"] for cell in line], [mean(cell["errors"]) for cell in line])
        for name, line in lines.items()
    ]
