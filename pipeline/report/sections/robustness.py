"""The report's section on corrupted test images."""

from __future__ import annotations

from typing import Any

from data.images.corruptions import CORRUPTIONS
from pipeline.pages import plots
from pipeline.pages.html import paragraph, plot, section, side_by_side, table
from pipeline.report.facts import Facts, Model
from pipeline.report.numbers import percent

_WORDS = (
    "Part that is wrong of {images:,} test images, under 15 corruptions (arXiv 1903.12261), in the mean of 5 severities each. "
    "Frost is drawn, not photographed; the figures compare models of this page, not those of papers."
)


def robustness_section(facts: Facts) -> str:
    """Errors under corruptions, side by side; nothing where they were not measured."""
    measured = [(model, figures) for model in facts.models if (figures := robustness_of(model)) is not None]
    if not measured:
        return ""
    names = [name.replace("_", " ") for name in CORRUPTIONS]
    means = [[100 * sum(figures["errors"][name]) / 5 for name in CORRUPTIONS] for _, figures in measured]
    series = [
        (model.name, plots.color_of(facts.models.index(model)), values)
        for (model, _), values in zip(measured, means, strict=True)
    ]
    svg = plots.dots_per_row(names, series, "% wrong, mean of 5 severities")
    words = _WORDS.format(images=measured[0][1]["images"])
    return section(
        "Robustness",
        paragraph(said_in_short(facts)),
        side_by_side(
            plot(svg, "Dot plot of errors per corruption. Figures in the table."), _table(measured, names, means)
        ),
        paragraph(words, "soft"),
    )


def said_in_short(facts: Facts) -> str:
    """`Under corruption: teacher 26.2 % wrong, student 19.4 % (0.82 times its teacher's errors).` Empty where it was not measured."""
    parts = []
    for model in facts.models:
        if (figures := robustness_of(model)) is not None:
            ratio = figures.get("error_against_teacher")
            ending = f" ({ratio:.2f} times its teacher's errors)" if ratio is not None else ""
            parts.append(f"{model.name} {percent(figures['mean_corruption_error'], 1)} wrong{ending}")
    return f"Under corruption: {', '.join(parts)}." if parts else ""


def robustness_of(model: Model) -> dict[str, Any] | None:
    """What `pipeline.evaluation.robustness` found of a model."""
    found: dict[str, Any] | None = (model.figures or {}).get("robustness")
    return found


def _table(measured: list[tuple[Model, dict[str, Any]]], names: list[str], means: list[list[float]]) -> str:
    whole = [("none", "clean_error"), ("mean of all", "mean_corruption_error")]
    ends = [[name, *(f"{100 * figures[key]:.1f}" for _, figures in measured)] for name, key in whole]
    rows = [[name, *(f"{values[row]:.1f}" for values in means)] for row, name in enumerate(names)]
    return table(["corruption", *(f"{model.name}, %" for model, _ in measured)], [ends[0], *rows, ends[1]])
