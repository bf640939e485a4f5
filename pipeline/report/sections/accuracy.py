"""Sections on accuracy on the test images: of each model, of each class, deciding on generations, on other data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data import storage
from data.json_files import read_json
from pipeline.core.layout import RESULTS_NAME
from pipeline.core.stage import StageError
from pipeline.evaluation.generations import RULE, Decision, describe_best, read_decision, summarize
from pipeline.pages import plots, transfer_table
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Model, compare, num_parameters
from pipeline.report.numbers import binomial_error, millions, percent, points, signed, with_error

MAX_CLASSES = 20


def accuracy_section(facts: Facts) -> Section:
    """Show the accuracy of each model, and the differences between them."""
    tested = [model for model in facts.models if model.figures]
    values = {
        "models": [model.name for model in facts.models],
        "rows": _accuracy_rows(facts.models),
        "num_images": tested[-1].figures["images"] if tested else None,
        "differences": _differences(facts),
        "chart": _accuracy_chart(tested) if tested else None,
    }
    return Section("accuracy.html", values)


def _accuracy_rows(models: Sequence[Model]) -> list[list[str]]:
    """A row per figure, a column per model: two models fit a phone's width."""
    tested: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("top-1", lambda figures: with_error(figures["top1"], figures["images"])),
        ("top-5", lambda figures: percent(figures["top5"])),
        ("calibration error", lambda figures: percent(figures["calibration_error"])),
        ("GFLOPs per image", lambda figures: f"{figures['flops'] / 1e9:.3g}"),
    ]
    rows = [[name, *(write(model.figures) if model.figures else "–" for model in models)] for name, write in tested]
    return [
        *(row for row in rows if any(cell != "–" for cell in row[1:])),
        ["parameters", *(millions(num_parameters(model)) for model in models)],
        ["top-1, validation", *(percent(model.validation_top1) for model in models)],
        ["network", *(model.architecture for model in models)],
    ]


def _accuracy_chart(tested: Sequence[Model]) -> Figure:
    top1, top5 = ([100 * model.figures[key] for model in tested] for key in ("top1", "top5"))
    errors = [100 * binomial_error(model.figures["top1"], model.figures["images"]) for model in tested]
    names = [model.name for model in tested]
    values = "; ".join(f"{name} {a:.2f} % and {b:.2f} %" for name, a, b in zip(names, top1, top5, strict=True))
    return Figure(plots.accuracy_bars(names, top1, top5, errors), f"Bar chart of top-1 and top-5 accuracy: {values}.")


def _differences(facts: Facts) -> list[list[str]]:
    """Compare each student with the model that labeled for it, and the last one with the first teacher."""
    pairs = list(zip(facts.models, facts.models[1:], strict=False))
    if len(facts.models) > 2:
        pairs.append((facts.models[0], facts.models[-1]))
    return [
        [f"{second.name} − {first.name}", points(result), f"{result.gained:,}", f"{result.lost:,}"]
        for first, second in pairs
        if (result := compare(first, second)) is not None
    ]


def class_section(facts: Facts) -> Section | None:
    """Show accuracy per class; of many classes, those that changed most."""
    tested = [model for model in facts.models if model.figures]
    if not tested:
        return None
    values = 100 * np.array(
        [model.figures["per_class_top1"] for model in tested], float
    )  # (models, C); NaN for a class without test images
    change = values[-1] - values[0]
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    if not len(known):
        return None
    chosen = (
        known[np.argsort(-np.abs(change[known]), kind="stable")[:MAX_CLASSES]] if len(known) > MAX_CLASSES else known
    )
    chosen = chosen[np.argsort(change[chosen], kind="stable")]
    names = [facts.class_name(label) for label in chosen]
    rows = [
        [name, *(f"{value:.1f}" for value in values[:, label]), signed(change[label])]
        for name, label in zip(names, chosen, strict=True)
    ]
    extremes = f"Largest loss: {names[0]} ({rows[0][-1]} points); largest gain: {names[-1]} ({rows[-1][-1]})."
    summary = extremes if len(tested) > 1 else ""
    series = [
        (model.name, plots.color_of(facts.models.index(model)), values[row, chosen]) for row, model in enumerate(tested)
    ]
    svg = plots.dots_per_row(names, series, "top-1, % of the class's test images")
    shown = {
        "summary": summary,
        "num_shown": len(chosen),
        "num_classes": len(known),
        "header": ["class", *(f"{model.name}, %" for model in tested), "change, points"],
        "rows": rows,
        "chart": Figure(svg, f"Dot plot of top-1 accuracy per class. {summary} The table has the values."),
    }
    return Section("classes.html", shown)


def generations_section(facts: Facts) -> Section | None:
    """Show what generations=auto decided after each generation, its rule, and the best generation."""
    layouts = [generation.layout for generation in facts.generations]
    found = {layout.generation: decision for layout in layouts if (decision := read_decision(layout)) is not None}
    if facts.config.generations != "auto" or not found:
        return None
    summary = summarize(layouts)  # empty if the first teacher was trained without validation images
    values = {
        "rows": [_decision_row(number, decision) for number, decision in found.items()],
        "best": describe_best(summary) if summary else "",
        "rule": RULE,
        "max_generations": facts.config.max_generations,
    }
    return Section("generations.html", values)


def _decision_row(number: int, decision: Decision) -> list[str]:
    accuracies = (percent(decision.teacher_top1), percent(decision.student_top1))
    return [str(number), *accuracies, points(decision.comparison), "yes" if decision.goes_on else "no"]


def transfer_section(facts: Facts) -> Section | None:
    """Show the tables and the plot of stage=transfer; None without results. Raises StageError when its file is damaged."""
    url = storage.join(facts.generations[0].layout.transfer, RESULTS_NAME)
    if not storage.exists(url):
        return None
    remedy = "remove it and run stage=transfer again"
    return transfer_table.transfer_section(read_json(url, remedy, transfer_table.TransferRecord, StageError))
