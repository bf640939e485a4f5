"""The report's section on generations=auto: what decided on each further round."""

from __future__ import annotations

from pipeline.evaluation.generations import RULE, Decision, describe_best, read_decision, summarize
from pipeline.pages.html import paragraph, section, table
from pipeline.report.facts import Facts
from pipeline.report.numbers import percent, points


def generations_section(facts: Facts) -> str:
    """A row per generation that was decided about, the rule, and the best generation; nothing where none was."""
    layouts = [generation.layout for generation in facts.generations]
    found = {layout.generation: decision for layout in layouts if (decision := read_decision(layout)) is not None}
    if facts.config.generations != "auto" or not found:
        return ""
    header = ["generation", "teacher", "student", "difference, points", "more than its error"]
    rows = [_row(number, decision) for number, decision in found.items()]
    words = (
        f"The rule: {RULE}; at most {facts.config.max_generations}. Both models see the same validation images, those of "
        "the training curves; test images are not looked at."
    )
    summary = summarize(layouts)  # nothing, if the first teacher was made without validation images
    best = describe_best(summary) if summary else ""
    shown = paragraph(f"{best[0].upper()}{best[1:]}.") if best else ""
    return section("Generations", shown, table(header, rows), paragraph(words, "soft"))


def _row(number: int, decision: Decision) -> list[str]:
    accuracies = (percent(decision.teacher_top1), percent(decision.student_top1))
    return [str(number), *accuracies, points(decision.comparison), "yes" if decision.goes_on else "no"]
