"""Sections on whether a generation's labels can be trusted, and how they differ from those of the generation before."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.inference.calibration import MIN_IN_BIN, reliability_bins
from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Generation
from pipeline.report.numbers import percent
from pipeline.report.sections.accuracy import MAX_CLASSES
from pipeline.report.survey import RIGHT, WRONG, Survey, SurveyedLabels
from teacher.diff import changes, side
from teacher.label_quality import LabelQuality, judge_kept, judge_labels
from teacher.validation_labels import ValidationLabels

_MAX_FLIPS = 10
_Series = tuple[str, str, np.ndarray, np.ndarray]  # name, colour, confidences, accuracies


def trust_section(facts: Facts, labels: SurveyedLabels) -> Section:
    """Show expected and measured precision, per class where validation images measure it, and the reliability diagram."""
    precision = (labels.selection or {}).get("precision")
    header, rows = _precision_table(precision, labels.survey)
    values = {
        "of_generation": facts.of_generation(labels.generation),
        "quality": quality_of(labels),
        "header": header,
        "rows": rows,
        "chart": _reliability(facts, labels.generation),
        "min_in_bin": MIN_IN_BIN,
        "precision": precision,
        "classes": _class_table(facts, precision["classes"]) if precision is not None and facts.class_names else None,
    }
    return Section("trust.html", values)


def quality_of(labels: SurveyedLabels) -> LabelQuality:
    """What the validation images say about the kept labels; before stage=select, about all labels."""
    validation = ValidationLabels.read(labels.generation.layout.labels)
    if labels.selection is not None:
        return judge_kept(validation, labels.selection)
    return judge_labels(validation, labels.generation.records["label"]["summary"])


def _precision_table(precision: dict[str, Any] | None, survey: Survey) -> tuple[list[str], list[list[str]]]:
    """Header and rows; without the columns of the truth if that is not known."""
    rows = []
    for name, images, confidence, verdicts in (
        ("all labels", survey.num_labels, survey.confidence_of_all, survey.counts.sum(axis=(0, 2))),
        ("kept labels", int(survey.kept_by_class.sum()), survey.confidence_of_kept, survey.kept_by_class.sum(axis=1)),
    ):
        if images:
            rows.append(_precision_row(f"{name}: mean confidence", images, confidence / images, "", verdicts))
    if precision is not None and precision["checked_on"]["images"]:
        checked = precision["checked_on"]
        interval = f" ({percent(checked['low'], 1)} to {percent(checked['high'], 1)})"
        name = "at or above the threshold: validation images"
        rows.append(_precision_row(name, int(survey.above.sum()), checked["precision"], interval, survey.above))
    header = ["", "labels", "expected", "right, by the truth", "expected − right"]
    known = any(row[3] != "–" for row in rows)
    return (header, rows) if known else (header[:3], [row[:3] for row in rows])


def _precision_row(name: str, images: int, expected: float, interval: str, verdicts: np.ndarray) -> list[str]:
    known = int(verdicts[RIGHT] + verdicts[WRONG])
    row = [name, f"{images:,}", percent(expected, 1) + interval]
    if not known:
        return [*row, "–", "–"]
    measured = verdicts[RIGHT] / known
    return [*row, percent(measured, 1), f"{100 * (expected - measured):+.1f}"]


def _class_table(facts: Facts, classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Header, rows, and how many there would be; of many classes, those of the lowest precision."""
    tested = [entry for entry in classes if entry["images"]]
    shown = tested
    if len(tested) > MAX_CLASSES:
        shown = sorted(tested, key=lambda entry: (entry["precision"], entry["class"]))[:MAX_CLASSES]
    columns = {
        "class": [facts.class_name(entry["class"]) for entry in shown],
        "threshold": [f"{entry['threshold']:.3f}" for entry in shown],
        "images": [f"{entry['images']:,}" for entry in shown],
        "precision": [percent(entry["precision"], 1) for entry in shown],
        "95 % interval": [f"{100 * entry['low']:.0f} to {100 * entry['high']:.0f}" for entry in shown],
    }
    if len(set(columns["threshold"])) <= 1:
        del columns["threshold"]
    return {"header": list(columns), "rows": list(zip(*columns.values(), strict=True)), "num_tested": len(tested)}


def _reliability(facts: Facts, generation: Generation) -> Figure | None:
    """Draw the teacher's calibration on the validation images: before and after temperature scaling, and as it labels."""
    series = [*_temperature_series(facts, generation), *_labeling_series(generation)]
    names = "; ".join(name for name, *_ in series)
    return Figure(plots.reliability(series), f"Reliability diagram: {names}.") if series else None


def _temperature_series(facts: Facts, generation: Generation) -> list[_Series]:
    summary = facts.models[generation.layout.generation - 1].record["summary"]
    series = []
    for when, color in (("before", plots.BEFORE), ("after", plots.color_of(0))):
        bins = summary.get("reliability", {}).get(when)
        if bins and bins["confidence"]:
            name = f"{when} temperature scaling (ECE {percent(summary[f'calibration_error_{when}'])})"
            series.append((name, color, np.array(bins["confidence"]), np.array(bins["accuracy"])))
    return series


def _labeling_series(generation: Generation) -> list[_Series]:
    """The validation images scored in the way of the unlabeled ones: with all views."""
    rows = ValidationLabels.read(generation.layout.labels)
    means, accuracy = reliability_bins(rows.confidence, rows.label == rows.predicted)
    return [("as it labels", plots.color_of(1), means, accuracy)] if len(means) else []


def flips_section(facts: Facts, labels: SurveyedLabels) -> Section | None:
    """Show which labels differ from those of the generation before; None for the first generation."""
    generation, number = labels.generation, labels.generation.layout.generation
    before = next((other for other in facts.generations if other.layout.generation == number - 1), None)
    if before is None or not {"label", "select"} <= before.records.keys() & generation.records.keys():
        return None
    layouts = {str(entry.layout.generation): entry.layout for entry in (before, generation)}
    one, two = (side(layouts, name) for name in layouts)
    result = changes(one, two)
    moved = sorted(result["classes"], key=lambda entry: (-entry["flipped_away"], entry["class"]))[:_MAX_FLIPS]
    values = {
        "of_generation": facts.of_generation(labels.generation),
        "before": number - 1,
        "num_flipped": result["flipped"],
        "num_both": result["images"]["both"],
        "flip_rate": percent(result["flip_rate"]),
        "flips": [[flip["before"], flip["after"], f"{flip['images']:,}"] for flip in result["flips"][:_MAX_FLIPS]],
        "classes": [
            [entry["class"], f"{entry['labels_before']:,}", f"{entry['labels_after']:,}", f"{entry['flipped_away']:,}"]
            for entry in moved
        ],
    }
    return Section("flips.html", values)
