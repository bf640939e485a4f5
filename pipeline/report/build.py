"""stage=report: RUN/report.html, one page that says whether the run worked, and the table at its end. Reads only, but for that file.

The page is a function of the run directory (and of the versions of the libraries that write it): no clock, no random order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.timing import duration
from pipeline.pages.html import page, paragraph, text, tiles
from pipeline.report.facts import Facts, compare, num_parameters, read_facts
from pipeline.report.numbers import millions, percent, points, signed, verdict
from pipeline.report.sections.changes import changes_section
from pipeline.report.sections.cost import cost_in_short, cost_section
from pipeline.report.sections.generations import generations_section
from pipeline.report.sections.models import accuracy_section, calibration_section, class_section, curves_section
from pipeline.report.sections.provenance import provenance_section
from pipeline.report.sections.pseudo_labels import pseudo_label_sections, read_surveys
from pipeline.report.sections.robustness import robustness_section, said_in_short
from pipeline.report.sections.timeline import course_section, times
from pipeline.report.survey import Survey

REPORT_NAME = "report.html"


def write_report(config: Config, layouts: Sequence[Layout]) -> None:
    """Write RUN/report.html from what the run's stages committed, and print the table.

    Raises:
        StageError: no stage is done, or a file that a record names is missing.
    """
    facts = read_facts(config, layouts)
    surveys = read_surveys(facts)
    url = storage.join(layouts[0].run_dir, REPORT_NAME)
    storage.write_text(url, report_html(facts, surveys))
    print_table(facts, surveys, url)


def report_html(facts: Facts, surveys: Mapping[int, Survey]) -> str:
    """The whole page."""
    title, top = _headline(facts, surveys)
    labels = [
        part
        for generation in facts.generations
        if (survey := surveys.get(generation.layout.generation)) is not None
        for part in pseudo_label_sections(facts, generation, survey)
    ]
    models = [
        accuracy_section(facts),
        generations_section(facts),
        class_section(facts),
        changes_section(facts),
        robustness_section(facts),
        curves_section(facts),
    ]
    models += [cost_section(facts), calibration_section(facts)]
    return page(title, [top, course_section(facts), *models, *labels, provenance_section(facts)])


def print_table(facts: Facts, surveys: Mapping[int, Survey], url: str) -> None:
    """The figures of the run on a terminal."""
    rows: list[tuple[str, ...]] = [("", "top-1", "top-5", "parameters", "against its teacher, points")]
    for position, model in enumerate(facts.models):
        figures = model.figures or {}
        against = compare(facts.models[position - 1], model) if position else None
        accuracies = [percent(figures.get(key)) for key in ("top1", "top5")]
        if not figures and model.validation_top1 is not None:
            accuracies[0] = f"{percent(model.validation_top1)} (validation)"
        rows.append((model.name, *accuracies, millions(num_parameters(model)), points(against) if against else ""))
    tested = next((model.figures["images"] for model in facts.models if model.figures), None)
    print(f"\nOn {tested:,} test images:" if tested else "\nNot evaluated on test images.")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    for generation in facts.generations:
        if (survey := surveys.get(generation.layout.generation)) is not None:
            ending = f" {generation.layout.generation}" if len(facts.generations) > 1 else ""
            print(f"pseudo-labels{ending}: {_kept(generation.records, survey)}")
    if short := said_in_short(facts):
        print(short)
    if cost := cost_in_short(facts):
        print(cost)
    print("time: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in times(facts)))
    print(f"report: {_without_credentials(url)}")


def _headline(facts: Facts, surveys: Mapping[int, Survey]) -> tuple[str, str]:
    """The page's title, and the part of the page that answers first."""
    first, last = facts.models[0], facts.models[-1]
    comparison = compare(first, last) if last is not first else None
    title = "There is no student to compare with its teacher yet" if last is first else verdict(first, last, comparison)
    shown = [
        (percent((model.figures or {}).get("top1")), f"{model.name}, top-1 on test images") for model in facts.models
    ]
    if not any(model.figures for model in facts.models):
        shown = [
            (percent(model.validation_top1), f"{model.name}, top-1 on validation images") for model in facts.models
        ]
    if comparison is not None:
        gained = f"± {100 * comparison.error:.2f} points; {comparison.gained:,} images gained, {comparison.lost:,} lost"
        shown.append((signed(100 * comparison.difference), gained))
    for generation in facts.generations:
        survey = surveys.get(generation.layout.generation)
        if survey is not None and "select" in generation.records:
            right = survey.right_fraction(kept_only=True)
            ending = f", {percent(right, 1)} right" if right is not None else ""
            shown.append((f"{generation.records['select']['summary']['kept']:,}", f"pseudo-labels kept{ending}"))
    shown.append((duration(sum(seconds for _, seconds in times(facts))), "computing time of all stages"))
    notes = [f'<p class="note">{text(note)}</p>' for generation in facts.generations for note in generation.notes]
    return title, "\n".join(
        [
            "<header>",
            paragraph("Noisy Student training", "soft"),
            f"<h1>{text(title)}</h1>",
            *notes,
            tiles(shown),
            "</header>",
        ]
    )


def _kept(records: Mapping[str, Mapping[str, Mapping[str, int]]], survey: Survey) -> str:
    """`15,000 of 54,000 kept; 91.89 % of the kept and 77.79 % of all are right`."""
    labels = f"{records['label']['summary']['labels']:,}"
    words = (
        f"{records['select']['summary']['kept']:,} of {labels} kept"
        if "select" in records
        else f"{labels}, none selected"
    )
    of_all, of_kept = survey.right_fraction(kept_only=False), survey.right_fraction(kept_only=True)
    if of_all is None:
        return words
    return f"{words}; {percent(of_kept)} of the kept and {percent(of_all)} of all are right"


def _without_credentials(url: str) -> str:
    if storage.is_local(url):
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
