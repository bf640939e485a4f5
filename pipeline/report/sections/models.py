"""The report's sections on teacher and students."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.inference.calibration import MIN_IN_BIN, reliability_bins, temperature_at_bound
from pipeline.pages import plots
from pipeline.pages.html import paragraph, plot, printable, section, side_by_side, table
from pipeline.report.facts import Facts, Model, compare, num_parameters, read_metrics
from pipeline.report.numbers import binomial_error, millions, percent, points, signed, with_error

MAX_CLASSES = 20


def accuracy_section(facts: Facts) -> str:
    """Accuracies side by side."""
    tested = [model for model in facts.models if model.figures]
    rows = _accuracy_rows(facts.models)
    if tested:
        number = (tested[-1].figures or {})["images"]
        words = f"On {number:,} test images; ± is the binomial standard error of one model alone."
    else:
        words = "No test images: give data.test=… and run stage=evaluate to measure teacher and student."
    figures = table(["", *(model.name for model in facts.models)], rows)
    right = [_accuracy_plot(tested)] if tested else []
    return section("Accuracy", paragraph(words, "soft"), side_by_side(figures + _differences(facts), *right))


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


def _accuracy_plot(tested: Sequence[Model]) -> str:
    values = {key: [100 * (model.figures or {})[key] for model in tested] for key in ("top1", "top5")}
    errors = [
        100 * binomial_error(figures["top1"], figures["images"]) for model in tested if (figures := model.figures)
    ]
    names = [model.name for model in tested]
    said = "; ".join(
        f"{name} {one:.2f} % and {five:.2f} %"
        for name, one, five in zip(names, values["top1"], values["top5"], strict=True)
    )
    svg = plots.accuracy_bars(names, values["top1"], values["top5"], errors)
    return plot(svg, f"Bar chart of top-1 and top-5 accuracy: {said}.")


def _differences(facts: Facts) -> str:
    """Each student against the model that labeled for it, and the last against the first teacher."""
    pairs = list(zip(facts.models, facts.models[1:], strict=False))
    if len(facts.models) > 2:
        pairs.append((facts.models[0], facts.models[-1]))
    rows = []
    for first, second in pairs:
        result = compare(first, second)
        if result is not None:
            rows.append(
                [f"{second.name} − {first.name}", points(result), f"{result.gained:,}", f"{result.lost:,}"],
            )
    if not rows:
        return ""
    words = (
        "± is the standard error of paired differences: both models see the same images, so only those count that one has right "
        "and the other wrong. It says nothing about other seeds."
    )
    return table(["", "top-1, points", "gained", "lost"], rows) + paragraph(words, "soft")


def class_section(facts: Facts) -> str:
    """Accuracy per class; of many classes, those that changed most."""
    tested = [model for model in facts.models if model.figures]
    if not tested:
        return ""
    values = np.array(
        [[np.nan if v is None else 100 * v for v in (model.figures or {})["per_class_top1"]] for model in tested]
    )
    change = values[-1] - values[0]
    known = np.flatnonzero(~np.isnan(values).any(axis=0))
    if not len(known):
        return ""
    chosen = (
        known if len(known) <= MAX_CLASSES else known[np.argsort(-np.abs(change[known]), kind="stable")[:MAX_CLASSES]]
    )
    chosen = chosen[np.argsort(change[chosen], kind="stable")]
    names = [name_of(facts, label) for label in chosen]
    series = [
        (model.name, plots.color_of(facts.models.index(model)), values[row, chosen]) for row, model in enumerate(tested)
    ]
    rows = [
        [name, *(f"{value:.1f}" for value in values[:, label]), signed(change[label])]
        for name, label in zip(names, chosen, strict=True)
    ]
    some = "" if len(chosen) == len(known) else f" The {MAX_CLASSES} of {len(known):,} classes that changed most."
    worst = f"Largest loss: {names[0]} ({rows[0][-1]} points); largest gain: {names[-1]} ({rows[-1][-1]})."
    summary = worst if len(tested) > 1 else ""
    header = ["class", *(f"{model.name}, %" for model in tested), "change, points"]
    svg = plots.dots_per_row(names, series, "top-1, % of the class's test images")
    return section(
        "Accuracy per class",
        paragraph(f"{summary}{some}") if summary or some else "",
        side_by_side(
            plot(svg, f"Dot plot of top-1 accuracy per class. {summary} Figures in the table."),
            table(header, rows),
        ),
    )  # fmt: skip


def curves_section(facts: Facts) -> str:
    """Loss and validation accuracy over the steps."""
    parts = []
    for key, label, scale in (("loss", "training loss", 1.0), ("validation_top1", "validation top-1, %", 100.0)):
        series = []
        for position, model in enumerate(facts.models):
            lines = [line for line in read_metrics(model) if key in line]
            if lines:
                steps, values = [line["step"] for line in lines], [scale * line[key] for line in lines]
                series.append((model.name, plots.color_of(position), steps, values))
        if series:
            ends = "; ".join(
                f"{name} ends at {values[-1]:.3g} after step {steps[-1]:,.0f}" for name, _, steps, values in series
            )
            parts.append(plot(plots.curves(series, label), f"Line chart of {label} over training steps: {ends}."))
    note = (
        "The loss of a student is not comparable with its teacher's: other targets, other noise. "
        "Validation is with EMA weights and without noise."
    )
    return section("Training", side_by_side(*parts), paragraph(note, "soft")) if parts else ""


def calibration_section(facts: Facts) -> str:
    """Whether confidences can be trusted: on the test images, and on the validation images that set the temperatures."""
    series, said = [], []
    for position, model in enumerate(facts.models):
        if model.predictions is not None and model.figures is not None:
            confidence, accuracy = reliability_bins(model.predictions.confidence, model.predictions.right)
            name = f"{model.name} (ECE {percent(model.figures['calibration_error'])})"
            series.append((name, plots.color_of(position), confidence, accuracy))
            said.append(name)
    caption = (
        f"On the test images, in 15 bins of confidence; those with fewer than {MIN_IN_BIN} images are left out. "
        "Below the diagonal: more confident than right. ECE: expected calibration error."
    )
    drawing = plot(plots.reliability(series), f"Reliability diagram: {'; '.join(said)}.", caption) if series else ""
    return section("Calibration", side_by_side(drawing, _temperatures(facts)))


def _temperatures(facts: Facts) -> str:
    rows = [
        [
            model.name,
            f"{summary['temperature']:.3f}",
            *(percent(summary[f"calibration_error_{when}"]) for when in ("before", "after")),
        ]
        for model in facts.models
        if "temperature" in (summary := model.record["summary"])
    ]
    notes = [
        f"{model.name}: {note}."
        for model in facts.models
        if (note := temperature_at_bound(model.record["summary"].get("temperature", 1.0)))
    ]
    words = (
        "Temperatures are fitted on the validation images before labeling; above 1, the network was too sure of itself."
    )
    header = ["", "temperature", "ECE before", "ECE after"]
    if not rows:
        return ""
    return table(header, rows, "On the validation images") + paragraph(" ".join([words, *notes]), "soft")


def name_of(facts: Facts, label: int) -> str:
    """The name of a class, safe to show."""
    return printable(facts.class_names[label]) if label < len(facts.class_names) else f"class {label}"
