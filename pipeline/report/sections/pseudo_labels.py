"""Sections on a generation's pseudo-labels: where the images went, classes before and after balancing, examples, quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.pages import plots
from pipeline.pages.render import Figure, Section
from pipeline.report.facts import Facts, Generation
from pipeline.report.numbers import percent
from pipeline.report.pictures import load_pictures, sample
from pipeline.report.sections.accuracy import MAX_CLASSES
from pipeline.report.survey import RIGHT, WRONG, ShownLabel, Survey, SurveyedLabels
from teacher.selection.quota import describe_quota

MAX_REASONS = 20
_REASONS = {
    "below_threshold": "below the confidence threshold",
    "over_quota": "over its class's quota",
    "near_duplicate": "near-duplicate of enough others",
    "held_out_duplicate": "near-duplicate of a validation or test image",
    "excluded_by_user": "excluded by the user",
}


def counts_section(facts: Facts, labels: SurveyedLabels) -> Section:
    """Show how many unlabeled images were labeled, left out and kept, how many labels are right, and their confidence."""
    survey = labels.survey
    select_summary = labels.generation.records.get("select", {}).get("summary", {})
    values = {
        "of_generation": facts.of_generation(labels.generation),
        "rows": _counts(labels.generation),
        "held_out": select_summary.get("near_duplicates"),
        "right_of_all": survey.right_fraction(kept_only=False),
        "right_of_kept": survey.right_fraction(kept_only=True),
        "num_known": int(survey.counts[:, (RIGHT, WRONG)].sum()),
        "chart": _histogram(facts, labels) if survey.num_labels else None,
    }
    return Section("label_counts.html", values)


def _counts(generation: Generation) -> list[list[str]]:
    summary = generation.records["label"]["summary"]
    num_images, quarantined = summary["images"], sum(summary["quarantined"].values())
    rows: list[tuple[str, int]] = [("unlabeled images", num_images), ("labeled by the teacher", summary["labels"])]
    if quarantined:
        rows.append(("quarantined: not usable", quarantined))
    if "select" in generation.records:
        selected = generation.records["select"]["summary"]
        reasons = [(_REASONS.get(name, name), count) for name, count in selected["reasons"].items() if count]
        rows += [*((f"left out: {name}", count) for name, count in reasons), ("kept", selected["kept"])]
        if selected["copies"] != selected["kept"]:
            rows.append(("kept, with copies for rare classes", selected["copies"]))
    return [[name, f"{count:,}", percent(count / max(num_images, 1), 1)] for name, count in rows]


def _histogram(facts: Facts, labels: SurveyedLabels) -> Figure:
    counts, selection = labels.survey.counts, labels.selection
    threshold = selection["rule"]["confidence_threshold"] if selection else facts.config.select.confidence_threshold
    below = int(counts[:, :, : round(threshold * counts.shape[-1])].sum())
    alt = (
        f"Histogram of the teacher's confidence in {labels.survey.num_labels:,} labels; "
        f"about {below:,} lie below the threshold of {threshold:g}."
    )
    return Figure(plots.confidence_histogram(counts, threshold), alt)


def balance_section(facts: Facts, labels: SurveyedLabels) -> Section | None:
    """Show classes before and after balancing, at most MAX_CLASSES of them; None before stage=select."""
    selection = labels.selection
    if selection is None:
        return None
    classes = selection["classes"]
    if len(classes) > MAX_CLASSES:  # the rarest: balancing is for them
        ordered = sorted(classes, key=lambda entry: (-entry["shortfall"], entry["available"], entry["class"]))
        classes = ordered[:MAX_CLASSES]
    names = [facts.class_name(entry["class"]) for entry in classes]
    available, kept, copies = (np.array([entry[key] for entry in classes]) for key in ("available", "kept", "copies"))
    alt = "Bar chart of each class's images above the threshold, kept, and with copies. The table has the values."
    header, rows = _class_table(classes, names, labels.survey)
    values = {
        "of_generation": facts.of_generation(labels.generation),
        "rule": selection["rule"],
        "quota": describe_quota(selection),
        "kept_from": selection.get("kept_from"),
        "num_short": sum(entry["shortfall"] > 0 for entry in selection["classes"]),
        "shortfall": selection["totals"]["shortfall"],
        "empty": [facts.class_name(label) for label in selection["empty_classes"]],
        "num_shown": len(classes),
        "num_classes": len(selection["classes"]),
        "chart": Figure(plots.class_balance(names, available, kept, copies), alt),
        "header": header,
        "rows": rows,
    }
    return Section("balance.html", values)


def _class_table(
    classes: Sequence[dict[str, Any]], names: Sequence[str], survey: Survey
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows; without a column of copies if there are none, and of right labels without a truth."""
    columns = {
        "class": list(names),
        "above threshold": [f"{entry['available']:,}" for entry in classes],
        "kept": [f"{entry['kept']:,}" for entry in classes],
        "with copies": [f"{entry['copies']:,}" for entry in classes],
        "cut-off": [f"{entry['cut_off']['confidence']:.3f}" for entry in classes],
    }
    if all(entry["copies"] == entry["kept"] for entry in classes):
        del columns["with copies"]
    right = survey.kept_by_class[RIGHT]
    known = right + survey.kept_by_class[WRONG]
    if known.any():
        labels = [entry["class"] for entry in classes]
        columns["right"] = [percent(right[label] / known[label] if known[label] else None, 1) for label in labels]
    return list(columns), list(zip(*columns.values(), strict=True))


def samples_section(facts: Facts, labels: SurveyedLabels) -> Section | None:
    """Show pseudo-labeled images, and how many of those drawn at random are wrong; None if no label was kept."""
    survey = labels.survey
    if not survey.drawn:
        return None
    groups = {
        "Kept, drawn at random": survey.drawn,
        "Just above the cut-off: the kept image of lowest confidence, one per class": survey.least,
        "Just below the cut-off: the image of highest confidence that was left out, one per class": survey.first_out,
    }
    known = [item for item in survey.drawn if item.truth >= 0]
    values = {
        "of_generation": facts.of_generation(labels.generation),
        "num_known": len(known),
        "num_wrong": sum(item.truth != item.label for item in known),
        "groups": {title: _samples(facts, labels.generation, shown) for title, shown in groups.items()},
    }
    return Section("label_samples.html", values)


def _samples(facts: Facts, generation: Generation, shown: Sequence[ShownLabel]) -> list[dict[str, str | None]]:
    pictures = load_pictures(generation.layout.labels, facts.config.data.unlabeled, shown)
    return [_sample(facts, label, *picture) for label, picture in zip(shown, pictures, strict=True)]


def _sample(facts: Facts, label: ShownLabel, key: str, source: str | None) -> dict[str, str | None]:
    name, is_right, verdict = facts.class_name(label.label), None, ""
    if label.truth >= 0:
        is_right = label.truth == label.label
        verdict = "✓ right" if is_right else f"✗ is {facts.class_name(label.truth)}"
    alt = f"{key}: pseudo-label {name}, confidence {label.confidence:.2f}. {verdict}"
    return sample(source, is_right, title=key, alt=alt, words=name, more=f"{label.confidence:.2f}", verdict=verdict)


def quarantine_section(facts: Facts, labels: SurveyedLabels) -> Section:
    """Show how many images could not be used, by reason; the rarest reasons in one row."""
    reasons = labels.generation.records["label"]["summary"]["quarantined"]
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rows = [[f"{count:,}", reason] for reason, count in ordered[:MAX_REASONS]]
    if rest := sum(count for _, count in ordered[MAX_REASONS:]):
        rows.append([f"{rest:,}", f"{len(ordered) - MAX_REASONS:,} other reasons"])
    return Section("quarantine.html", {"of_generation": facts.of_generation(labels.generation), "rows": rows})
