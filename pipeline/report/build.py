"""stage=report: write RUN/report.html, a page that says whether the run worked, and print its main figures.

It reads what the stages committed, and writes that one file. The page is a function of the run directory and of the libraries'
versions: it holds no time of writing, and nothing random.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from data import storage
from data.storage.redact import redacted
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.timing import duration
from pipeline.evaluation.outcome import Outcome, print_advice, validation_outcome, what_to_try
from pipeline.pages.render import Section, environment
from pipeline.pages.text import aligned_rows
from pipeline.report.facts import Facts, Model, compare, num_parameters, read_facts
from pipeline.report.numbers import millions, percent, points, signed
from pipeline.report.sections.accuracy import accuracy_section, class_section, generations_section, transfer_section
from pipeline.report.sections.changes import changes_section
from pipeline.report.sections.confusion import confusion_section
from pipeline.report.sections.cost import cost_section, cost_summary
from pipeline.report.sections.dataset import dataset_section
from pipeline.report.sections.pretraining import pretraining_section
from pipeline.report.sections.provenance import provenance_section
from pipeline.report.sections.pseudo_labels import balance_section, counts_section, quarantine_section, samples_section
from pipeline.report.sections.robustness import robustness_section, robustness_summary
from pipeline.report.sections.scaling import scaling_section
from pipeline.report.sections.timeline import stage_times, timeline_section
from pipeline.report.sections.training import calibration_section, curves_section
from pipeline.report.sections.trust import flips_section, trust_section
from pipeline.report.survey import SurveyedLabels, survey_generations

REPORT_NAME = "report.html"


def write_report(config: Config, layouts: Sequence[Layout]) -> None:
    """Write RUN/report.html from what the run's stages committed, and print the table.

    Raises StageError when no stage is done, or a file that a record names is missing.
    """
    facts = read_facts(config, layouts)
    labels = survey_generations(facts)
    url = storage.join(layouts[0].run_dir, REPORT_NAME)
    storage.write_text(url, report_html(facts, labels))
    print_table(facts, labels)
    print(f"report: {redacted(url)}")


def print_results(config: Config, layouts: Sequence[Layout]) -> None:
    """Print the table alone, without reading the labels. Raises as `write_report`."""
    print_table(read_facts(config, layouts), [])


def report_html(facts: Facts, labels: Sequence[SurveyedLabels]) -> str:
    """Render the whole page."""
    templates = environment("pipeline.report")
    sections = [
        (section.is_narrow, Markup(templates.get_template(section.template).render(section.values)))
        for section in report_sections(facts, labels)
    ]
    return templates.get_template("report.html").render(
        title=_title(facts),
        notes=_notes(facts),
        advice=_advice(facts),
        figures=_figures(facts, labels),
        sections=sections,
    )


def report_sections(facts: Facts, labels: Sequence[SurveyedLabels]) -> list[Section]:
    """The sections of the page in their order, without those that have nothing to show."""
    sections = [
        timeline_section(facts),
        accuracy_section(facts),
        generations_section(facts),
        class_section(facts),
        confusion_section(facts),
        changes_section(facts),
        robustness_section(facts),
        dataset_section(facts),
        pretraining_section(facts),
        transfer_section(facts),
        scaling_section(facts),
        curves_section(facts),
        cost_section(facts),
        calibration_section(facts),
    ]
    for entry in labels:
        sections += [
            counts_section(facts, entry),
            trust_section(facts, entry),
            balance_section(facts, entry),
            samples_section(facts, entry),
            flips_section(facts, entry),
            quarantine_section(facts, entry),
        ]
    sections.append(provenance_section(facts))
    return [section for section in sections if section is not None]


def print_table(facts: Facts, labels: Sequence[SurveyedLabels]) -> None:
    """Print whether the last student beats the first teacher, what to try if not, and the run's main figures."""
    print("", _title(facts), *_notes(facts), sep="\n")
    print_advice(_advice(facts))
    tested = next((model.figures["images"] for model in facts.models if model.figures), None)
    print(f"\nOn {tested:,} test images:" if tested else "\nNot evaluated on test images.")
    rows = _model_rows(facts)
    print(*aligned_rows(rows), sep="\n")
    if any("±" in cell for row in rows for cell in row):
        print("± is one standard error of the paired difference; it does not cover the variation between seeds.")
    for entry in labels:
        print(f"{facts.stage_name(entry.generation.layout.generation, 'pseudo-labels')}: {_labels_summary(entry)}")
    for summary in (robustness_summary(facts), cost_summary(facts)):
        if summary:
            print(summary)
    print("time: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in stage_times(facts)))


def _model_rows(facts: Facts) -> list[tuple[str, ...]]:
    """The printed table; with several generations also each student against the first teacher."""
    bases = {"its teacher": -1} | ({"the first teacher": 0} if len(facts.models) > 2 else {})
    rows: list[tuple[str, ...]] = [("", "top-1", "top-5", "parameters", *(f"against {name}, points" for name in bases))]
    for position, model in enumerate(facts.models):
        others = [facts.models[position - 1 if base else 0] for base in bases.values()] if position else []
        against = [points(found) if (found := compare(other, model)) else "" for other in others]
        accuracies = [percent(model.figures.get(key)) for key in ("top1", "top5")]
        if not model.figures and model.validation_top1 is not None:
            accuracies[0] = f"{percent(model.validation_top1)} (validation)"
        rows.append((model.name, *accuracies, millions(num_parameters(model)), *(against or [""] * len(bases))))
    return rows


def _labels_summary(labels: SurveyedLabels) -> str:
    """`15,000 of 54,000 kept; 91.89 % of the kept and 77.79 % of all are right`."""
    records, survey = labels.generation.records, labels.survey
    number = f"{records['label']['summary']['labels']:,}"
    selected = "select" in records
    words = f"{records['select']['summary']['kept']:,} of {number} kept" if selected else f"{number}, none selected"
    of_all, of_kept = survey.right_fraction(kept_only=False), survey.right_fraction(kept_only=True)
    if of_all is None:
        return words
    return f"{words}; {percent(of_kept)} of the kept and {percent(of_all)} of all are right"


def _outcome(facts: Facts) -> Outcome | None:
    """The last student beside the first teacher: on the test images, or else on the validation images."""
    return _compared(facts.models[0], facts.models[-1])


def _compared(first: Model, last: Model) -> Outcome | None:
    if last is first:
        return None
    if (found := compare(first, last)) is not None:
        return Outcome(last.name, first.name, found.difference, found.error, found.images, "test")
    return validation_outcome(last.name, first.name, first.record["summary"], last.record["summary"])


def _title(facts: Facts) -> str:
    """The page's title: one sentence on whether the last student beats the first teacher."""
    first, last = facts.models[0], facts.models[-1]
    if last is first:
        return "There is no student to compare with its teacher yet"
    found = _outcome(facts)
    if found is None:
        return f"{last.name.capitalize()} and {first.name} are not compared: no results on the same test images"
    return found.verdict()


def _notes(facts: Facts) -> list[str]:
    """What to know before the figures: a last student worse than the one before, outputs that are older than their inputs."""
    notes = [note for generation in facts.generations for note in generation.notes]
    if len(facts.models) > 2 and (found := _compared(*facts.models[-2:])) is not None and found.is_loss:
        notes.insert(0, f"{found.verdict()}, which labeled for it: {found.teacher} is the better model.")
    return notes


def _advice(facts: Facts) -> list[str]:
    """What to try where the last student is no clear gain over the first teacher, or worse than the one before."""
    outcomes = [_outcome(facts), *([_compared(*facts.models[-2:])] if len(facts.models) > 2 else [])]
    first = outcomes[0]
    if first is None or (first.is_gain and not any(found is not None and found.is_loss for found in outcomes)):
        return []
    return what_to_try(facts.config, facts.last_with_student.layout)


def _figures(facts: Facts, labels: Sequence[SurveyedLabels]) -> list[tuple[str, str]]:
    """The large figures on top of the page, each with what it is."""
    if any(model.figures for model in facts.models):
        figures = [
            (percent(model.figures.get("top1")), f"{model.name}, top-1 on test images") for model in facts.models
        ]
    else:
        figures = [
            (percent(model.validation_top1), f"{model.name}, top-1 on validation images") for model in facts.models
        ]
    first, last = facts.models[0], facts.models[-1]
    comparison = compare(first, last) if last is not first else None
    if comparison is not None:
        error = f"± {100 * comparison.error:.2f} points, one standard error"
        words = f"{error}; {comparison.gained:,} images gained, {comparison.lost:,} lost"
        figures.append((signed(100 * comparison.difference), words))
    for entry in labels:
        if "select" in entry.generation.records:
            right = entry.survey.right_fraction(kept_only=True)
            ending = f", {percent(right, 1)} right" if right is not None else ""
            kept = entry.generation.records["select"]["summary"]["kept"]
            figures.append((f"{kept:,}", f"pseudo-labels kept{ending}"))
    figures.append((duration(sum(seconds for _, seconds in stage_times(facts))), "computing time of all stages"))
    return figures
