"""The page of stage=compare."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.compare.runs import Run
from pipeline.compare.tables import ClassChanges, class_changes, tables
from pipeline.pages import plots
from pipeline.pages.render import Figure, environment
from pipeline.report.numbers import binomial_error

MAX_CLASSES = 20


def page_html(runs: Sequence[Run], verdicts: Sequence[str]) -> str:
    """Render the page; a function of the runs' records alone."""
    changed = class_changes(runs, MAX_CLASSES)
    return environment("pipeline.compare").get_template("compare.html").render(
        title=verdicts[0] if len(verdicts) == 1 else f"{len(runs)} runs side by side",
        verdicts=verdicts if len(verdicts) > 1 else [],
        names=[run.name for run in runs],
        tables=tables(runs),
        charts={"Cost": _speeds(runs)},
        classes=changed and {
            "header": ["class", f"{changed.runs[0].name}, %", *(f"{run.name}, points" for run in changed.runs[1:])],
            "rows": changed.rows(),
            "chart": _classes(changed),
            "num_shown": len(changed.names),
            "num_classes": changed.num_classes,
        },
    )  # fmt: skip


def _speeds(runs: Sequence[Run]) -> Figure | None:
    """Accuracy against speed, of the last model of each run; None where fewer than two were measured in one place."""
    found = [(at, run.name, run.last.figures, run.last.speed) for at, run in enumerate(runs) if run.last.speed]
    if len(found) < 2 or len({speed["where"] for *_, speed in found if speed}) > 1:
        return None
    points = [
        (name, plots.color_of(at), speed["images_per_s"], 100 * figures["top1"],
         100 * binomial_error(figures["top1"], figures["images"]))
        for at, name, figures, speed in found if speed
    ]  # fmt: skip
    values = "; ".join(f"{name} {top1:.2f} % at {rate:,.0f} images/s" for name, _, rate, top1, _ in points)
    return Figure(plots.accuracy_speed(points), f"Top-1 accuracy against images per second: {values}.")


def _classes(changed: ClassChanges) -> Figure:
    series = [(run.name, plots.color_of(at), changed.top1[at]) for at, run in enumerate(changed.runs)]
    svg = plots.dots_per_row(changed.names, series, "top-1, % of the class's test images")
    return Figure(svg, "Dot plot of top-1 accuracy per class and run. The table has the values.")
