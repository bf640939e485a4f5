"""Draw the figures of reports and studies as SVG. The same values give the same bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.pages.render import printable

Line = tuple[str, Sequence[float], Sequence[float]]
"""Name, values along x, values along y."""
Marked = tuple[str, str, float, float]
"""Name, colour, x, y."""

TEACHER, STUDENTS = "#b45309", ("#1d4ed8", "#7c3aed", "#0f766e", "#be185d")
RIGHT, WRONG, BEFORE, INK = "#2f7d4f", "#c2410c", "#a8b0bb", "#1f2937"
_LINES = (TEACHER, *STUDENTS, RIGHT)
_WIDTH, _HEIGHT = 4.2, 2.9  # inches; readable when a phone shows it at three quarters
_MAX_POINTS = 1000
_NAME_LENGTH = 22
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "noisy-student",  # element ids depend on the content alone
    "svg.fonttype": "none",
    "text.parse_math": False,  # a class may be named `$x$`
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
}


def color_of(position: int) -> str:
    """Colour of a model by its position; the first is the teacher."""
    return TEACHER if position == 0 else STUDENTS[(position - 1) % len(STUDENTS)]


def accuracy_bars(names: Sequence[str], top1: Sequence[float], top5: Sequence[float], errors: Sequence[float]) -> bytes:
    """Draw top-1 (with its standard error) and top-5 side by side; values in percent."""
    with _drawing(width=max(_WIDTH, 1.5 * len(names))) as (axes, svg):
        place = np.arange(len(names))
        colors = [color_of(position) for position in range(len(names))]
        first = axes.bar(place - 0.2, top1, 0.36, color=colors, yerr=errors, ecolor=INK, capsize=3)
        second = axes.bar(place + 0.2, top5, 0.36, color=colors, alpha=0.4)
        for bars in (first, second):
            axes.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
        ticks = [tick for position in place for tick in (position - 0.2, position + 0.2)]
        labels = [text for name in names for text in (f"{name}\ntop-1", "\ntop-5")]
        axes.set_xticks(ticks, labels, fontsize=9)
        axes.set_ylim(0, 112)
        axes.set_ylabel("% of test images")
        axes.grid(axis="x", visible=False)
    return svg.getvalue()


def curves(series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], y_label: str) -> bytes:
    """Draw lines over training steps, each (name, colour, steps, values)."""
    with _drawing() as (axes, svg):
        for name, color, steps, values in series:
            keep = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).astype(int))
            marker = "o" if len(keep) <= 30 else None
            axes.plot(
                np.array(steps)[keep], np.array(values)[keep], color=color, label=name, marker=marker, ms=4, lw=1.6
            )
        axes.set_xlabel("training step")
        axes.set_ylabel(y_label)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend()
    return svg.getvalue()


def class_balance(names: Sequence[str], available: np.ndarray, kept: np.ndarray, copies: np.ndarray) -> bytes:
    """Draw for each class its images above the threshold, the kept ones, and further copies of these; (C,) each."""
    with _drawing(height=_rows_height(names, 0.36)) as (axes, svg):
        place = np.arange(len(names))
        axes.barh(place - 0.2, available, 0.36, color=BEFORE, label="above the threshold")
        axes.barh(place + 0.2, kept, 0.36, color=STUDENTS[0], label="kept")
        if (copies > kept).any():
            axes.barh(
                place + 0.2, copies - kept, 0.36, left=kept, color="#93c5fd", hatch="///", edgecolor=STUDENTS[0], lw=0,
                label="copies",
            )  # fmt: skip
        _name_rows(axes, names)
        axes.set_xlabel("images")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _legend_above(axes)
    return svg.getvalue()


def dots_per_row(names: Sequence[str], models: Sequence[tuple[str, str, Sequence[float]]], x_label: str) -> bytes:
    """Draw a row of dots for each name, joined by a line; a model is (name, colour, percent for each row)."""
    with _drawing(height=_rows_height(names, 0.3)) as (axes, svg):
        place = np.arange(len(names))
        values = np.array([percent for _, _, percent in models])
        axes.hlines(place, values.min(axis=0), values.max(axis=0), color=BEFORE, lw=2)
        for position, (name, color, percent) in enumerate(models):
            axes.scatter(percent, place, s=42, color=color, label=name, marker="os^Dv"[position % 5], zorder=3)
        _name_rows(axes, names)
        axes.set_xlabel(x_label)
        _legend_above(axes)
    return svg.getvalue()


def intervals_per_row(
    names: Sequence[str], models: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], x_label: str
) -> bytes:
    """Draw a row for each name, in it a dot with an interval for each model (name, colour, percent and half interval per row)."""
    with _drawing(width=1.3 * _WIDTH, height=_rows_height(names, 0.2 + 0.1 * len(models))) as (axes, svg):
        place = np.arange(len(names))
        for position, (name, color, percent, errors) in enumerate(models):
            above = 0.7 * ((position + 0.5) / len(models) - 0.5)
            marker = "os^Dv"[position % 5]
            axes.errorbar(percent, place + above, xerr=errors, color=color, marker=marker, ms=4, ls="", label=name)
        _name_rows(axes, names)
        axes.set_xlabel(x_label)
        _legend_above(axes, columns=3)
    return svg.getvalue()


def confidence_histogram(counts: np.ndarray, threshold: float) -> bytes:
    """Draw a histogram of labels by confidence.

    Args:
        counts: (2, 3, bins) int64 by kept or not, verdict (unknown, right, wrong) and confidence.
    """
    unknown, right, wrong = counts.sum(axis=0)
    edges = np.linspace(0, 1, counts.shape[-1] + 1)
    layers = [(right, "right", RIGHT, ""), (wrong, "wrong", WRONG, "////"), (unknown, "labels", BEFORE, "")]

    with _drawing() as (axes, svg):
        bottom = np.zeros(len(right))
        for values, name, color, hatch in layers:
            if values.any():
                axes.bar(edges[:-1], values, np.diff(edges), bottom, align="edge", color=color, hatch=hatch, label=name,
                         edgecolor="white", lw=0.4)  # fmt: skip
                bottom = bottom + values
        if counts[1].any():
            axes.stairs(counts[1].sum(axis=0), edges, color=INK, lw=1.4, label="kept")
        axes.axvline(threshold, color=INK, ls="--", lw=1.2, label=f"threshold {threshold:g}")
        axes.set_xlim(0, 1)
        axes.set_xlabel("the teacher's confidence")
        axes.set_ylabel("images")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _legend_above(axes)
    return svg.getvalue()


def reliability(models: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> bytes:
    """Draw accuracy against mean confidence, each model (name, colour, confidences, accuracies of its bins)."""
    with _drawing() as (axes, svg):
        axes.plot([0, 1], [0, 1], color="#6b7280", ls="--", lw=1, label="perfect calibration")
        for position, (name, color, confidence, accuracy) in enumerate(models):
            axes.plot(
                confidence, accuracy, color=color, marker="os^Dv"[position % 5], ms=5, lw=1.6, label=name, clip_on=False
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        _legend_above(axes, columns=1)
    return svg.getvalue()


def timeline(rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], unit: str) -> bytes:
    """Draw when each row was at work: (name, (start, end) pairs in `unit` since the beginning)."""
    with _drawing(width=1.3 * _WIDTH, height=_rows_height([name for name, _ in rows], 0.25)) as (axes, svg):
        last = max(end for _, runs in rows for _, end in runs)
        for place, (_, runs) in enumerate(rows):
            bars = [(start, max(end - start, last / 300)) for start, end in runs]  # wide enough to be seen
            axes.broken_barh(bars, (place - 0.3, 0.6), color=STUDENTS[place % 2], lw=0)
        _name_rows(axes, [name for name, _ in rows])
        axes.set_xlim(0, last * 1.02 or 1)
        axes.set_xlabel(unit)
    return svg.getvalue()


def accuracy_speed(models: Sequence[tuple[str, str, float, float, float]]) -> bytes:
    """Draw top-1 over images per second, each model (name, colour, images/s, top-1 and standard error in percent)."""
    with _drawing() as (axes, svg):
        for position, (name, color, rate, top1, error) in enumerate(models):
            axes.errorbar(
                rate, top1, error, color=color, marker="os^Dv"[position % 5], ms=7, ls="", capsize=3, label=name
            )
        axes.set_xlim(0, 1.15 * max(rate for _, _, rate, _, _ in models))
        axes.set_xlabel("images/s")
        axes.set_ylabel("top-1, % of test images")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _legend_above(axes)
    return svg.getvalue()


def accuracy_latency(series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]], x_label: str) -> bytes:
    """Draw top-1 (percent) over seconds, logarithmic: a line for each (name, colour, seconds, top-1)."""
    with _drawing(width=1.6 * _WIDTH, height=1.4 * _HEIGHT) as (axes, svg):
        for position, (name, color, seconds, top1) in enumerate(series):
            axes.plot(seconds, top1, color=color, label=name, marker="os^Dv*"[position % 6], ms=5, lw=1.4)
        axes.set_xscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel("published top-1, %")
        _legend_above(axes)
    return svg.getvalue()


def study_rows(names: Sequence[str], top1: Sequence[Sequence[float]], published: Sequence[float | None]) -> bytes:
    """Draw a study's rows from top to bottom: points above the first row; seeds as dots, mean and published value as marks."""
    above = np.array(top1) - np.array(top1[0])  # (rows, seeds): seed by seed

    with _drawing(width=1.3 * _WIDTH, height=_rows_height(names, 0.3)) as (axes, svg):
        place = np.arange(len(names))
        axes.axvline(0, color=INK, lw=1)
        for seed in above.T:
            axes.scatter(seed, place, s=14, color=STUDENTS[0], alpha=0.4, lw=0)
        axes.plot(above.mean(axis=1), place, color=STUDENTS[0], marker="o", ms=6, lw=1.2, label="here (mean, seeds)")
        if None not in published:
            theirs = np.array(published, float) - np.array(published[0], float)
            axes.plot(theirs, place, color=TEACHER, marker="D", ms=5, lw=1.2, ls="--", label="published")
        _name_rows(axes, names)
        axes.set_xlabel(f"top-1, points above {names[0]!r}")
        _legend_above(axes)
    return svg.getvalue()


def error_against_flops(panels: Mapping[str, Sequence[Line]], models: Sequence[Marked] = ()) -> bytes:
    """Draw panels side by side with one scale: errors in per cent over log FLOPs, and a star for each of `models`."""
    with _drawings(len(panels), width=_WIDTH * max(1.3, len(panels))) as (all_axes, svg):
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            for position, (name, flops, errors) in enumerate(lines):
                dashes = ("-", "--", ":", "-.")[position // len(_LINES) % 4]
                axes.plot(flops, errors, dashes, marker="o", ms=4, color=_LINES[position % len(_LINES)], label=name)
            for name, color, cost, error in models:
                axes.plot([cost], [error], marker="*", ms=13, ls="", color=color, mec=INK, label=printable(name))
            axes.set_xscale("log")
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("FLOPs per image")
        all_axes[0].set_ylabel("error, %")
        all_axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return svg.getvalue()


@contextmanager
def _drawing(width: float = _WIDTH, height: float = _HEIGHT) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Yield axes to draw on, and the buffer that gets the SVG when the block ends."""
    with _drawings(1, width, height) as ((axes,), svg):
        yield axes, svg


@contextmanager
def _drawings(
    number: int, width: float = _WIDTH, height: float = _HEIGHT
) -> Iterator[tuple[Sequence[Axes], io.BytesIO]]:
    """Yield axes side by side, of one vertical scale, and the buffer that gets the SVG when the block ends."""
    options: dict[str, Any] = {"format": "svg", "metadata": {"Date": None, "Creator": None}}
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's browser has fonts of its own
        figure = Figure(figsize=(width, height), layout="constrained")
        yield list(figure.subplots(1, number, sharey=True, squeeze=False)[0]), buffer
        figure.savefig(buffer, **options)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    names = [printable(name) for name in names]
    short = [name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + "…" for name in names]
    axes.set_yticks(np.arange(len(names)), short, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _legend_above(axes: Axes, columns: int = 2) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4
    )


def _rows_height(names: Sequence[str], per_row: float) -> float:
    return max(2.2, 1.1 + per_row * len(names))
