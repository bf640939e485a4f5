"""Section on which classes the last model takes for which, with pictures behind the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data.shards.split import Shard
from pipeline.pages.render import Section
from pipeline.report.facts import Facts, Predictions
from pipeline.report.pictures import sample
from pipeline.report.splits import open_unchanged, picture

MAX_CLASSES = 20  # of a whole matrix; of more classes, SHOWN_CLASSES
SHOWN_CLASSES = 12  # those confused most often
_MAX_CELLS, _PER_CELL = 30, 5  # cells with pictures, and pictures of each: about 300 KB of a page


class _Cell(NamedTuple):
    """A cell of the matrix: `target` is the id of its pictures, empty without any; `css` its tint."""

    words: str
    css: str
    target: str
    alt: str


def confusion_section(facts: Facts) -> Section | None:
    """Show the confusion matrix of the last model on the test images; None before it is evaluated."""
    model = facts.models[-1]
    if model.predictions is None:
        return None
    counts = Counter(zip(model.predictions.labels.tolist(), model.predictions.predicted.tolist(), strict=True))
    wrong = sorted(
        ((n, pair) for pair, n in counts.items() if pair[0] != pair[1]), key=lambda item: (-item[0], item[1])
    )
    classes = _shown_classes(facts.num_classes, wrong)
    test = open_unchanged(facts, "test", model.predictions.test)
    pairs = [pair for _, pair in wrong if {*pair} <= {*classes}][:_MAX_CELLS] if test is not None else []
    largest = wrong[0][0] if wrong else 1
    values = {
        "model": model.name,
        "names": [facts.class_name(label) for label in classes],
        "rows": [
            (facts.class_name(truth), [_cell(facts, counts, (truth, taken), pairs, largest) for taken in classes])
            for truth in classes
        ],
        "num_classes": facts.num_classes,
        "groups": [_group(facts, model.predictions, test.shards, pair) for pair in pairs] if test is not None else [],
    }
    return Section("confusion.html", values)


def _shown_classes(num_classes: int, wrong: Sequence[tuple[int, tuple[int, int]]]) -> list[int]:
    """All classes; of many, those of the most frequent confusions."""
    if num_classes <= MAX_CLASSES:
        return list(range(num_classes))
    found = dict.fromkeys(label for _, pair in wrong for label in pair)
    return sorted(list(found)[:SHOWN_CLASSES])


def _cell(
    facts: Facts,
    counts: Counter[tuple[int, int]],
    pair: tuple[int, int],
    pairs: Sequence[tuple[int, int]],
    largest: int,
) -> _Cell:
    count = counts[pair]
    truth, taken = map(facts.class_name, pair)
    if pair[0] == pair[1]:
        return _Cell(f"{count:,}", "right", "", f"{truth}: {count:,} right")
    css = "" if count * 5 < largest else "often" if count * 2 > largest else "some"
    target = _target(pair) if pair in pairs else ""
    return _Cell(f"{count:,}" if count else "·", css, target, f"{count:,} of {truth} taken for {taken}")


def _target(pair: tuple[int, int]) -> str:
    return f"taken-{pair[0]}-{pair[1]}"


def _group(facts: Facts, predictions: Predictions, shards: Sequence[Shard], pair: tuple[int, int]) -> dict[str, Any]:
    """The pictures of a cell, those of the highest confidence first."""
    rows = np.flatnonzero((predictions.labels == pair[0]) & (predictions.predicted == pair[1]))
    rows = rows[np.argsort(-predictions.confidence[rows], kind="stable")]
    truth, taken = map(facts.class_name, pair)
    shown = []
    for row in rows[:_PER_CELL].tolist():
        key, source = picture(shards, row)
        confidence = f"{predictions.confidence[row]:.2f}"
        texts = {
            "title": key,
            "alt": f"{key}: {truth} taken for {taken}",
            "words": truth,
            "verdict": f"✗ {taken} {confidence}",
        }
        shown.append(sample(source, False, **texts))
    return {"id": _target(pair), "title": f"{truth} taken for {taken}: {len(rows):,} images", "samples": shown}
