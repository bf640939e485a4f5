"""Section on the self-supervised pretraining: its curves, and which images it saw."""

from __future__ import annotations

from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Model, Record, read_metrics
from pipeline.report.numbers import percent
from pipeline.training.evaluation import COLLAPSED

_CURVES = (
    ("loss", "loss", 1.0),
    ("knn_top1", "kNN top-1, % of labeled images", 100.0),
    ("spread", "feature spread", 1.0),
)
_COUNTS = (
    ("used", "used"),
    ("undecodable", "left out: cannot be decoded"),
    ("excluded", "left out: data.exclude"),
    ("held_out_copies", "left out: copies of held-out images"),
)


def pretraining_section(facts: Facts) -> Section | None:
    """Show loss, kNN accuracy and feature spread over the steps, and how many images were used and left out."""
    layout, record = facts.generations[0].layout, facts.generations[0].records.get("pretrain")
    if record is None:
        return None
    model = Model("pretraining", layout.pretrain, record)
    charts = [chart for curve in _CURVES if (chart := _chart(model, *curve)) is not None]
    summary = record["summary"]
    values = {
        "charts": charts,
        "objective": record["fingerprint"]["config"]["pretrain.objective"],
        "counts": [[words, f"{summary[name]:,}"] for name, words in _COUNTS if name in summary],
        "knn": percent(summary["knn_top1"]) if "knn_top1" in summary else "",
        "collapsed": _collapsed(summary),
    }
    return Section("pretraining.html", values)


def _chart(model: Model, name: str, label: str, scale: float) -> Figure | None:
    lines = [line for line in read_metrics(model) if name in line]
    if not lines:
        return None
    steps, values = [line["step"] for line in lines], [scale * line[name] for line in lines]
    alt = f"Line chart of the pretraining's {label} over its steps: it ends at {values[-1]:.3g} after step {steps[-1]:,.0f}."
    return Figure(plots.curves([(model.name, plots.color_of(1), steps, values)], label), alt)


def _collapsed(summary: Record) -> str:
    """The feature spread at the end if the features have collapsed, else nothing."""
    spread = summary.get("spread")
    return f"{spread:.3f}" if spread is not None and spread < COLLAPSED else ""
