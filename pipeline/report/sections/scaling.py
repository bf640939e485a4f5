"""Section on the scaling study of the run: what it shows, and where teacher and student are on its front."""

from __future__ import annotations

import json

from data import storage
from pipeline.core.stage import StageError
from pipeline.pages.plots import Marked, color_of
from pipeline.pages.render import Figure, Section
from pipeline.pages.scaling_plot import FINDINGS_NAME, SCALING, lengths, scaling_plot
from pipeline.report.facts import Facts


def scaling_section(facts: Facts) -> Section | None:
    """Show the study's plot with the run's models in it, and its findings; None without a finished study.

    Raises StageError when its file is damaged.
    """
    url = storage.join(facts.generations[0].layout.study(SCALING), FINDINGS_NAME)
    if not storage.exists(url):
        return None
    try:
        content = json.loads(storage.read_text(url))
        cells, findings = content["cells"], [[found["question"], found["answer"]] for found in content["findings"]]
        marked = _marked(facts)
        chart = Figure(scaling_plot(cells, marked), _alt(len(cells), len(lengths(cells)), marked))
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{url}: damaged ({error!r}); remove it and run stage=ablate ablate.study={SCALING} again"
        ) from None
    return Section("scaling.html", {"chart": chart, "findings": findings, "models": [name for name, *_ in marked]})


def _marked(facts: Facts) -> list[Marked]:
    """Models whose FLOPs stage=evaluate has counted, at their error on the validation images, where the study has its own."""
    return [
        (model.name, color_of(position), model.figures["flops"], 100 * (1 - model.validation_top1))
        for position, model in enumerate(facts.models)
        if "flops" in model.figures and model.validation_top1 is not None
    ]


def _alt(cells: int, panels: int, marked: list[Marked]) -> str:
    places = "".join(f"; {name} {error:.1f} % at {flops:.3g}" for name, _, flops, error in marked)
    return f"Error against FLOPs per image of {cells} models, a panel for each of {panels} lengths of training{places}."
