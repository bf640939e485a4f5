"""The report's sections on pseudo-labels: where the images went, classes before and after balancing, confidence, examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.labels.label_files import COPIES_REMEDY
from pipeline.core.committed_files import read_output_json
from pipeline.pages import plots
from pipeline.pages.html import heading, paragraph, plot, section, side_by_side, table
from pipeline.report.facts import Facts, Generation
from pipeline.report.numbers import percent
from pipeline.report.pictures import card, grid
from pipeline.report.sections.models import MAX_CLASSES, name_of
from pipeline.report.sections.trust import flips_parts, trust_parts
from pipeline.report.survey import RIGHT, WRONG, Limits, Picture, Survey, load_pictures, read_truth, survey_labels

MAX_REASONS = 20
_REASONS = {
    "below_threshold": "below the confidence threshold",
    "over_quota": "over its class's share",
    "near_duplicate": "the same picture as enough others",
    "held_out_duplicate": "like a validation or test image",
    "excluded_by_user": "excluded by the user",
}


def read_surveys(facts: Facts) -> dict[int, Survey]:
    """The survey of each generation that has labels, by its number."""
    truth = read_truth(facts.config.data.truth)
    surveys = {}
    for generation in facts.generations:
        if "label" in generation.records:
            num_classes = generation.records["label"]["summary"]["num_classes"]
            limits = Limits.of(_read_selection(generation), num_classes)
            surveys[generation.layout.generation] = survey_labels(generation, truth, facts.config.seed, limits)
    return surveys


def pseudo_label_sections(facts: Facts, generation: Generation, survey: Survey) -> list[str]:
    """All sections on one generation's labels."""
    ending = f", generation {generation.layout.generation}" if len(facts.generations) > 1 else ""
    selection = _read_selection(generation)
    return [
        section(
            f"Pseudo-labels{ending}",
            side_by_side(_where_images_went(generation, survey), _histogram(facts, generation, survey)),
        ),
        section(f"Can the labels be trusted{ending}?", *trust_parts(facts, generation, selection, survey)),
        section(f"Classes before and after balancing{ending}", *_balance(facts, selection, survey))
        if selection
        else "",
        section(f"Pseudo-labeled images{ending}", *_examples(facts, generation, survey)) if survey.drawn else "",
        section(f"Labels that changed{ending}", *flips) if (flips := flips_parts(facts, generation)) else "",
        section(f"Quarantined images{ending}", _quarantine(generation)),
    ]


def _read_selection(generation: Generation) -> dict[str, Any] | None:
    if "select" not in generation.records or generation.selection_folder is None:
        return None
    return read_output_json(generation.selection_folder, "selection.json", generation.records["select"], COPIES_REMEDY)


def _where_images_went(generation: Generation, survey: Survey) -> str:
    labels = generation.records["label"]["summary"]
    images = labels["images"]
    quarantined = sum(labels["quarantined"].values())
    rows: list[tuple[str, int]] = [("unlabeled images", images), ("labeled by the teacher", labels["labels"])]
    if quarantined:
        rows.append(("quarantined: not usable", quarantined))
    if "select" in generation.records:
        selected = generation.records["select"]["summary"]
        reasons = [(_REASONS.get(name, name), count) for name, count in selected["reasons"].items() if count]
        rows += [*((f"left out: {name}", count) for name, count in reasons), ("kept", selected["kept"])]
        if selected["copies"] != selected["kept"]:
            rows.append(("kept, with copies for rare classes", selected["copies"]))
    lines = [[name, f"{count:,}", percent(count / max(images, 1), 1)] for name, count in rows]
    return table(["", "images", "of all"], lines) + _copies_of_held_out(generation) + paragraph(_quality(survey))


def _copies_of_held_out(generation: Generation) -> str:
    """Where the copies of held-out images are listed, once they were searched for."""
    found = generation.records.get("select", {}).get("summary", {}).get("near_duplicates")
    if found is None:
        return ""
    words = (
        f"{found['near_duplicates']:,} unlabeled images are near-duplicates of one of the {found['held_out']:,} held-out images; "
        f"each is listed, with the image it is like, in {found['listing']}."
    )
    if found["not_seen"]:
        words += f" {found['not_seen']:,} that might be could not be looked at; there, equal hashes count."
    return paragraph(words, "soft")


def _quality(survey: Survey) -> str:
    of_all, of_kept = survey.right_fraction(kept_only=False), survey.right_fraction(kept_only=True)
    if of_all is None:
        return "How many of them are right is not known: there is no truth file (data.truth)."
    known = int(survey.counts[:, (RIGHT, WRONG)].sum())
    kept = f", and {percent(of_kept)} of the kept ones" if of_kept is not None else ""
    return (
        f"{percent(of_all)} of the pseudo-labels are right{kept}, where the truth is known ({known:,} images). "
        "No stage chooses by the truth; it is counted for this report and summary.json alone."
    )


def _balance(facts: Facts, selection: dict[str, Any], survey: Survey) -> list[str]:
    classes, rule = selection["classes"], selection["rule"]
    many = len(classes) > MAX_CLASSES
    if many:  # the rarest are those that balancing is for
        classes = sorted(classes, key=lambda entry: (-entry["shortfall"], entry["available"], entry["class"]))[
            :MAX_CLASSES
        ]
    names = [name_of(facts, entry["class"]) for entry in classes]
    available, kept, copies = (np.array([entry[key] for entry in classes]) for key in ("available", "kept", "copies"))
    quota = "all of them" if rule["per_class"] is None else f"{rule['per_class']:,} per class, the most confident first"
    words = (
        f"At or above a confidence of {rule['confidence_threshold']:g}: {quota}; rare classes are repeated up to "
        f"{rule['max_copies']} times. " + _shortfall(facts, selection)
    )
    if "kept_from" in selection:
        words = (
            f"The images and copies of {selection['kept_from']}, with this generation's labels; none was chosen anew."
        )
    if many:
        words += f" Shown: the {MAX_CLASSES} of {len(selection['classes']):,} classes with the fewest images."
    alt = "Bar chart of each class's images above the threshold, kept, and with copies; the figures are in the table."
    drawing = plot(plots.class_balance(names, available, kept, copies), alt)
    return [paragraph(words), side_by_side(drawing, _class_table(classes, names, survey))]


def _shortfall(facts: Facts, selection: dict[str, Any]) -> str:
    short = [entry for entry in selection["classes"] if entry["shortfall"] > 0]
    empty = [name_of(facts, label) for label in selection["empty_classes"]]
    if not short:
        return "Every class reached its share." if selection["rule"]["per_class"] is not None else ""
    words = f"{len(short):,} classes fall short, by {selection['totals']['shortfall']:,} images together."
    if empty:
        more = "" if len(empty) <= 5 else f" and {len(empty) - 5:,} more"
        words += f" Classes without any image: {', '.join(empty[:5])}{more}."
    return words


def _class_table(classes: Sequence[dict[str, Any]], names: Sequence[str], survey: Survey) -> str:
    known = survey.kept_by_class[RIGHT] + survey.kept_by_class[WRONG]
    columns = {"above threshold": [f"{entry['available']:,}" for entry in classes]}
    columns["kept"] = [f"{entry['kept']:,}" for entry in classes]
    if any(entry["copies"] != entry["kept"] for entry in classes):
        columns["with copies"] = [f"{entry['copies']:,}" for entry in classes]
    columns["cut-off"] = [f"{entry['cut_off']['confidence']:.3f}" for entry in classes]
    if known.any():
        labels = [entry["class"] for entry in classes]
        columns["right"] = [
            percent(survey.kept_by_class[RIGHT][label] / known[label], 1) if known[label] else "–" for label in labels
        ]
    return table(["class", *columns], list(zip(names, *columns.values(), strict=True)))


def _histogram(facts: Facts, generation: Generation, survey: Survey) -> str:
    if not survey.counts.any():
        return ""
    selection = _read_selection(generation)
    threshold = selection["rule"]["confidence_threshold"] if selection else facts.config.select.confidence_threshold
    total = int(survey.counts.sum())
    below = int(survey.counts[:, :, : round(threshold * survey.counts.shape[-1])].sum())
    alt = f"Histogram of the teacher's confidence in {total:,} labels; about {below:,} lie below the threshold of {threshold:g}."
    caption = "All pseudo-labels by confidence; the outline is of those that were kept."
    if survey.right_fraction(kept_only=False) is None:
        caption += " Right and wrong ones cannot be told apart without a truth file."
    return plot(plots.confidence_histogram(survey.counts, threshold), alt, caption)


def _examples(facts: Facts, generation: Generation, survey: Survey) -> list[str]:
    parts = []
    groups = [
        ("Drawn at random from the kept ones", survey.drawn),
        ("Just above the cut-off: the least confident of those kept, one per class", survey.least),
        ("Just below it: the most confident of those left out, one per class", survey.first_out),
    ]
    for title, shown in groups:
        pictures = load_pictures(generation.layout.labels, facts.config.data.unlabeled, shown)
        parts += [heading(title), grid([_card(facts, picture) for picture in pictures])]
    known = [item for item in survey.drawn if item.truth >= 0]
    if known:
        wrong = sum(item.truth != item.label for item in known)
        parts.insert(0, paragraph(f"Of the {len(known)} drawn at random, {wrong} are wrong (dashed).", "soft"))
    return parts


def _card(facts: Facts, picture: Picture) -> str:
    shown = picture.shown
    name, is_right, words = name_of(facts, shown.label), None, ""
    if shown.truth >= 0:
        is_right = shown.truth == shown.label
        words = "✓ right" if is_right else f"✗ is {name_of(facts, shown.truth)}"
    alt = f"{picture.key}: pseudo-label {name}, confidence {shown.confidence:.2f}. {words}"
    return card(picture.data_uri, is_right, picture.key, alt, f"{name} {shown.confidence:.2f}", words)


def _quarantine(generation: Generation) -> str:
    reasons = generation.records["label"]["summary"]["quarantined"]
    if not reasons:
        return paragraph("None: every image was read and labeled.", "soft")
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rows = [[f"{count:,}", reason] for reason, count in ordered[:MAX_REASONS]]
    rest = sum(count for _, count in ordered[MAX_REASONS:])
    if rest:
        rows.append([f"{rest:,}", f"{len(ordered) - MAX_REASONS:,} other reasons"])
    where = "Each of them, with shard, key and offset, is in labels/quarantine.parquet."
    return table(["images", "reason"], rows, css="texts") + paragraph(where, "soft")
