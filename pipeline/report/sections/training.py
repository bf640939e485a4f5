"""Sections on what training logged and fitted: curves over the steps, and calibration."""

from __future__ import annotations

from pipeline.inference.calibration import MIN_IN_BIN, reliability_bins, temperature_at_bound
from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, read_metrics
from pipeline.report.numbers import percent


def curves_section(facts: Facts) -> Section | None:
    """Show training loss and validation accuracy over the steps."""
    curves = [
        _curves(facts, "loss", "training loss", 1.0),
        _curves(facts, "validation_top1", "validation top-1, %", 100.0),
    ]
    charts = [chart for chart in curves if chart is not None]
    return Section("curves.html", {"charts": charts}) if charts else None


def _curves(facts: Facts, key: str, label: str, scale: float) -> Figure | None:
    series = []
    for position, model in enumerate(facts.models):
        lines = [line for line in read_metrics(model) if key in line]
        if lines:
            steps, values = [line["step"] for line in lines], [scale * line[key] for line in lines]
            series.append((model.name, plots.color_of(position), steps, values))
    if not series:
        return None
    ends = "; ".join(
        f"{name} ends at {values[-1]:.3g} after step {steps[-1]:,.0f}" for name, _, steps, values in series
    )
    return Figure(plots.curves(series, label), f"Line chart of {label} over training steps: {ends}.")


def calibration_section(facts: Facts) -> Section | None:
    """Show how far confidences can be trusted: on the test images, and on the validation images that set the temperatures."""
    chart, temperatures = _reliability(facts), _temperatures(facts)
    if chart is None and not temperatures:
        return None
    notes = [
        f"{model.name}: {note}."
        for model in facts.models
        if (note := temperature_at_bound(model.record["summary"].get("temperature", 1.0)))
    ]
    values = {"chart": chart, "min_in_bin": MIN_IN_BIN, "temperatures": temperatures, "notes": notes}
    return Section("calibration.html", values, is_narrow=True)


def _reliability(facts: Facts) -> Figure | None:
    series = []
    for position, model in enumerate(facts.models):
        if model.predictions is not None:
            bins = reliability_bins(model.predictions.confidence, model.predictions.right)
            name = f"{model.name} (ECE {percent(model.figures['calibration_error'])})"
            series.append((name, plots.color_of(position), *bins))
    names = "; ".join(name for name, *_ in series)
    return Figure(plots.reliability(series), f"Reliability diagram: {names}.") if series else None


def _temperatures(facts: Facts) -> list[list[str]]:
    summaries = [(model.name, model.record["summary"]) for model in facts.models]
    return [
        [
            name,
            f"{summary['temperature']:.3f}",
            percent(summary["calibration_error_before"]),
            percent(summary["calibration_error_after"]),
        ]
        for name, summary in summaries
        if "temperature" in summary
    ]
