"""The report's section on trust: what was promised of the labels' precision, and what the validation images and the truth say."""

from __future__ import annotations

from typing import Any

import numpy as np

from data import storage
from data.labels.label_files import LABELS_OUTPUT_REMEDY, VALIDATION_NAME
from pipeline.core.committed_files import read_output_table
from pipeline.inference.calibration import MIN_IN_BIN, reliability_bins
from pipeline.pages import plots
from pipeline.pages.html import paragraph, plot, side_by_side, table
from pipeline.report.facts import Facts, Generation
from pipeline.report.numbers import percent
from pipeline.report.sections.models import MAX_CLASSES, name_of
from pipeline.report.survey import RIGHT, WRONG, Survey
from teacher.diff import as_json, compare, side

_SHOWN_FLIPS = 10


def trust_parts(facts: Facts, generation: Generation, selection: dict[str, Any] | None, survey: Survey) -> list[str]:
    """Promised and found precision, per class where there are validation images, and the reliability diagram before and after."""
    found = (selection or {}).get("precision")
    drawing = _reliability(facts, generation)
    promises = _promises(found, survey)
    parts = [side_by_side(promises, drawing) if drawing else promises]
    if found is not None:
        parts.append(paragraph(_verdict(found)))
        if facts.class_names:
            parts.append(_class_table(facts, found))
    return parts


def flips_parts(facts: Facts, generation: Generation) -> list[str]:
    """How the labels differ from the generation before; nothing for the first one."""
    number = generation.layout.generation
    before = next((other for other in facts.generations if other.layout.generation == number - 1), None)
    if before is None or not {"label", "select"} <= before.records.keys() & generation.records.keys():
        return []
    layouts = {str(entry.layout.generation): entry.layout for entry in (before, generation)}
    one, two = (side(layouts, name) for name in layouts)
    result = as_json(one, two, compare(one, two))
    rows = [[flip["before"], flip["after"], f"{flip['images']:,}"] for flip in result["flips"][:_SHOWN_FLIPS]]
    moved = sorted(result["classes"], key=lambda entry: (-entry["flipped_away"], entry["class"]))[:_SHOWN_FLIPS]
    classes = [
        [entry["class"], f"{entry['labels_before']:,}", f"{entry['labels_after']:,}", f"{entry['flipped_away']:,}"]
        for entry in moved
    ]
    words = (
        f"{result['flipped']:,} of {result['images']['both']:,} labels ({percent(result['flip_rate'])}) are others than in generation "
        f"{number - 1}. `stage=diff` has all of it."
    )
    if not rows:
        return [paragraph(words)]
    return [
        paragraph(words),
        side_by_side(
            table(["from", "to", "images"], rows, "Most frequent changes"),
            table(["class", "labels before", "now", "flipped away"], classes, "Classes that changed most"),
        ),
    ]


def _promises(found: dict[str, Any] | None, survey: Survey) -> str:
    """Promised and real precision side by side."""
    rows = []
    for name, images, confidence, verdicts in (
        ("all labels", survey.num_labels, survey.confidence_of_all, survey.counts.sum(axis=(0, 2))),
        ("kept labels", int(survey.kept_by_class.sum()), survey.confidence_of_kept, survey.kept_by_class.sum(axis=1)),
    ):
        if images:
            rows.append(_promise_row(f"{name}: mean confidence", images, confidence / images, "", verdicts))
    if found is not None and found["checked_on"]["images"]:
        checked = found["checked_on"]
        interval = f" ({percent(checked['low'], 1)} to {percent(checked['high'], 1)})"
        name = "at or above the threshold: validation images"
        rows.append(_promise_row(name, int(survey.above.sum()), checked["precision"], interval, survey.above))
    header = ["", "labels", "promised", "right, by the truth", "off by, points"]
    if all(row[3] == "–" for row in rows):
        header, rows = header[:3], [row[:3] for row in rows]
    return table(header, rows, "Precision of the labels, promised and found")


def _promise_row(name: str, images: int, promised: float, interval: str, verdicts: np.ndarray) -> list[str]:
    known = int(verdicts[RIGHT] + verdicts[WRONG])
    real = verdicts[RIGHT] / known if known else None
    row = [name, f"{images:,}", percent(promised, 1) + interval]
    return [*row, percent(real, 1), f"{100 * (promised - real):+.1f}"] if real is not None else [*row, "–", "–"]


def _verdict(found: dict[str, Any]) -> str:
    checked, target = found["checked_on"], found["target"]
    above = (
        f"{checked['right']:,} of {checked['images']:,} validation images at or above the threshold are labeled right"
    )
    if target is None:
        return f"{above}. This goes for images like the labeled ones; of unlabeled images from elsewhere nobody knows."
    return (
        f"A precision of {percent(target, 1)} was asked for; the threshold was chosen on one half of the validation images and checked "
        f"on the other: {above}. Verdict: {found['verdict']}. This goes for images like the labeled ones."
    )


def _class_table(facts: Facts, found: dict[str, Any]) -> str:
    """Per class; of many classes, those with the lowest precision."""
    classes = [entry for entry in found["classes"] if entry["images"]]
    many = len(classes) > MAX_CLASSES
    if many:
        classes = sorted(classes, key=lambda entry: (entry["precision"], entry["class"]))[:MAX_CLASSES]
    columns = {
        "images": [f"{entry['images']:,}" for entry in classes],
        "precision": [percent(entry["precision"], 1) for entry in classes],
        "95 % interval": [f"{100 * entry['low']:.0f} to {100 * entry['high']:.0f}" for entry in classes],
    }
    if len({entry["threshold"] for entry in classes}) > 1:
        columns = {"threshold": [f"{entry['threshold']:.3f}" for entry in classes]} | columns
    names = [name_of(facts, entry["class"]) for entry in classes]
    caption = "Precision at the threshold per class, on validation images" + f"; the {MAX_CLASSES} lowest" * many
    return table(["class", *columns], list(zip(names, *columns.values(), strict=True)), caption)


def _reliability(facts: Facts, generation: Generation) -> str:
    """The teacher's confidence on the validation images: before the temperature, after it, and as it labels (views)."""
    teacher = facts.models[generation.layout.generation - 1]
    series: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for when, color in (("before", plots.BEFORE), ("after", plots.color_of(0))):
        bins = teacher.record["summary"].get("reliability", {}).get(when)
        if bins and bins["confidence"]:
            name = f"{when} temperature scaling (ECE {percent(teacher.record['summary'][f'calibration_error_{when}'])})"
            series.append((name, color, np.array(bins["confidence"]), np.array(bins["accuracy"])))
    url = storage.join(generation.layout.labels, VALIDATION_NAME)
    if storage.exists(url):
        record, columns = generation.records.get("label"), ["label", "predicted", "confidence"]
        rows = read_output_table(generation.layout.labels, VALIDATION_NAME, record, LABELS_OUTPUT_REMEDY, columns)
        label, predicted, confidence = (rows.column(name).to_numpy() for name in columns)
        means, accuracy = reliability_bins(confidence, label == predicted)
        if len(means):
            series.append(("as it labels", plots.color_of(1), means, accuracy))
    if not series:
        return ""
    caption = (
        f"The teacher on the validation images, in 15 bins; those with fewer than {MIN_IN_BIN} images are left out."
    )
    said = "; ".join(name for name, *_ in series)
    return plot(plots.reliability(series), f"Reliability diagram: {said}.", caption)
