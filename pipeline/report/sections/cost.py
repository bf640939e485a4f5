"""The report's section on what teacher and students cost to use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.pages import plots
from pipeline.pages.html import paragraph, plot, section, side_by_side, table
from pipeline.report.facts import Facts, Model
from pipeline.report.numbers import binomial_error, millions

_WORDS = (
    "Measured by stage=evaluate ({where}), from pixels to logits, without decoding, batch norms folded; clocks differ from machine to "
    "machine and from run to run. FLOPs are 2 × multiply-adds of one image."
)


def cost_section(facts: Facts) -> str:
    """Latency, images per second, parameters and FLOPs, and accuracy against speed; nothing where it was not measured."""
    models = [(model, model.figures, model.speed) for model in facts.models if model.figures and model.speed]
    if not models:
        return ""
    columns = [_column(figures, speed) for _, figures, speed in models]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    points = [
        (
            model.name, plots.color_of(facts.models.index(model)), speed["images_per_s"], 100 * figures["top1"],
            100 * binomial_error(figures["top1"], figures["images"]),
        )
        for model, figures, speed in models
    ]  # fmt: skip
    said = "; ".join(f"{name} {top1:.2f} % at {rate:,.0f} images/s" for name, _, rate, top1, _ in points)
    drawing = plot(plots.accuracy_speed(points), f"Top-1 accuracy against images per second: {said}.")
    words = _WORDS.format(where=models[0][2]["where"])
    figures_table = table(["", *(model.name for model, _, _ in models)], rows)
    return section("Cost", side_by_side(figures_table, drawing), paragraph(words, "soft"))


def _column(figures: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, str]:
    """One model's cells by the name of their row."""
    return {
        "one image alone, ms": f"{speed['latency_ms']:.2f}",
        "images/s, in batches": f"{speed['images_per_s']:,.0f}",
        "parameters": millions(figures["parameters"]),
        "GFLOPs per image": f"{figures['flops'] / 1e9:.3g}",
    }


def cost_in_short(facts: Facts) -> str:
    """`speed (CPU, 1 thread): teacher 1.20 ms an image alone, 2,310 images/s in batches; …`; empty where it was not measured."""
    parts = [_in_short(model, model.speed) for model in facts.models if model.speed]
    where = next((model.speed["where"] for model in facts.models if model.speed), "")
    return f"speed ({where}): {'; '.join(parts)}" if parts else ""


def _in_short(model: Model, speed: dict[str, Any]) -> str:
    return f"{model.name} {speed['latency_ms']:.2f} ms an image alone, {speed['images_per_s']:,.0f} images/s in batches"
