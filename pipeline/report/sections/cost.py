"""Section on what inference with each model costs."""

from __future__ import annotations

from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Record
from pipeline.report.numbers import binomial_error, millions


def cost_section(facts: Facts) -> Section | None:
    """Show latency, images per second, parameters and FLOPs, and accuracy against speed; None if not measured."""
    models = [(model, model.figures, model.speed) for model in facts.models if model.speed]
    if not models:
        return None
    columns = [_column(figures, speed) for _, figures, speed in models]
    points = [
        (
            model.name, plots.color_of(facts.models.index(model)), speed["images_per_s"], 100 * figures["top1"],
            100 * binomial_error(figures["top1"], figures["images"]),
        )
        for model, figures, speed in models
    ]  # fmt: skip
    values = "; ".join(f"{name} {top1:.2f} % at {rate:,.0f} images/s" for name, _, rate, top1, _ in points)
    shown = {
        "models": [model.name for model, _, _ in models],
        "rows": [[name, *(column[name] for column in columns)] for name in columns[0]],
        "chart": Figure(plots.accuracy_speed(points), f"Top-1 accuracy against images per second: {values}."),
        "where": models[0][2]["where"],
        "busy": _busy(facts),
    }
    return Section("cost.html", shown, is_narrow=True)


def _column(figures: Record, speed: Record) -> dict[str, str]:
    """One model's cells by the name of their row."""
    return {
        "one image alone, ms": f"{speed['latency_ms']:.2f}",
        "images/s, in batches": f"{speed['images_per_s']:,.0f}",
        "parameters": millions(figures["parameters"]),
        "GFLOPs per image": f"{figures['flops'] / 1e9:.3g}",
    }


def _busy(facts: Facts) -> str:
    """Which figures were measured while the machine was busy, and how much the rounds differ; empty if none was."""
    busy = [
        (model.name, model.speed.get("spread", 0.0)) for model in facts.models if model.speed and model.speed["busy"]
    ]
    if not busy:
        return ""
    spreads = ", ".join(f"{name} by {100 * spread:.0f} %" for name, spread in busy)
    return (
        f"measured on a busy machine, where five rounds differ ({spreads}): compare no speeds; on a quiet one, "
        "stage=evaluate force=true measures again"
    )


def cost_summary(facts: Facts) -> str:
    """`speed (CPU, 1 thread): teacher 1.20 ms an image alone, 2,310 images/s in batches; …`; empty if not measured."""
    measured = [(model.name, model.speed) for model in facts.models if model.speed]
    parts = [
        f"{name} {speed['latency_ms']:.2f} ms an image alone, {speed['images_per_s']:,.0f} images/s in batches"
        for name, speed in measured
    ]
    busy = f" ({_busy(facts)})" if _busy(facts) else ""
    return f"speed ({measured[0][1]['where']}): {'; '.join(parts)}{busy}" if parts else ""
