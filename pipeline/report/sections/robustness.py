"""Section on errors on corrupted test images."""

from __future__ import annotations

from data.images.corruptions import CORRUPTIONS
from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Model, Record
from pipeline.report.numbers import percent


def robustness_section(facts: Facts) -> Section | None:
    """Show each model's errors under each corruption; None if not measured."""
    measured = _measured(facts)
    if not measured:
        return None
    means = {name: [100 * sum(found["errors"][name]) / 5 for _, found in measured] for name in CORRUPTIONS}
    series = [
        (model.name, plots.color_of(facts.models.index(model)), [row[column] for row in means.values()])
        for column, (model, _) in enumerate(measured)
    ]
    rows = {
        "none": [100 * found["clean_error"] for _, found in measured],
        **{name.replace("_", " "): row for name, row in means.items()},
        "mean of all": [100 * found["mean_corruption_error"] for _, found in measured],
    }
    svg = plots.dots_per_row(list(rows)[1:-1], series, "% wrong, mean of 5 severities")
    values = {
        "summary": robustness_summary(facts),
        "num_images": measured[0][1]["images"],
        "header": ["corruption", *(f"{model.name}, %" for model, _ in measured)],
        "rows": [[name, *(f"{value:.1f}" for value in row)] for name, row in rows.items()],
        "chart": Figure(svg, "Dot plot of errors per corruption. The table has the values."),
    }
    return Section("robustness.html", values)


def robustness_summary(facts: Facts) -> str:
    """`Under corruption: teacher 26.2 % wrong, student 19.4 % wrong (0.82 times its teacher's errors).`; empty if not measured."""
    parts = []
    for model, found in _measured(facts):
        ratio = found.get("error_against_teacher")
        ending = f" ({ratio:.2f} times its teacher's errors)" if ratio is not None else ""
        parts.append(f"{model.name} {percent(found['mean_corruption_error'], 1)} wrong{ending}")
    return f"Under corruption: {', '.join(parts)}." if parts else ""


def _measured(facts: Facts) -> list[tuple[Model, Record]]:
    """The models tested under corruptions, each with the results of pipeline.evaluation.robustness."""
    return [
        (model, model.figures["robustness"])
        for model in facts.models
        if model.figures and "robustness" in model.figures
    ]
