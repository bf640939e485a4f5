"""Section on where the student differs from its teacher: confusions that changed, images gained and lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.shards.split import Shard
from pipeline.pages.render import Section
from pipeline.report.facts import Facts, Predictions, compare
from pipeline.report.pictures import sample
from pipeline.report.splits import open_unchanged, picture

_MAX_PAIRS, _MAX_SHOWN = 8, 12


class _Pair(NamedTuple):
    """Predictions of the first teacher and of the last student on the same test images."""

    teacher: Predictions
    student: Predictions


def changes_section(facts: Facts) -> Section | None:
    """Compare the last student with the first teacher on the test images; None if no image was gained or lost."""
    first, last = facts.models[0], facts.models[-1]
    result = compare(first, last)
    if result is None or first.predictions is None or last.predictions is None or not result.gained + result.lost:
        return None
    pair = _Pair(first.predictions, last.predictions)
    test = open_unchanged(facts, "test", pair.teacher.test)
    values = {
        "models": [first.name, last.name],
        "gained": result.gained,
        "lost": result.lost,
        "confusions": _confusion_tables(facts, pair),
        "groups": _samples(facts, pair, test.shards) if test is not None else None,
    }
    return Section("changes.html", values)


def _confusion_tables(facts: Facts, pair: _Pair) -> dict[str, list[list[str]]]:
    """Rows (confusion, by the teacher, by the student) by title; of those that changed most."""
    found = confusions(*pair)
    change = found.second - found.first
    order = np.argsort(change, kind="stable")
    chosen = {
        "Confusions that became rarer": [at for at in order[:_MAX_PAIRS] if change[at] < 0],
        "Confusions that became more frequent": [at for at in order[::-1][:_MAX_PAIRS] if change[at] > 0],
    }

    def row(at: int) -> list[str]:
        truth, predicted = (facts.class_name(int(classes[at])) for classes in (found.truth, found.predicted))
        return [f"{truth} taken for {predicted}", f"{found.first[at]:,}", f"{found.second[at]:,}"]

    return {title: [row(at) for at in places] for title, places in chosen.items() if places}


class Confusions(NamedTuple):
    """Pairs of classes that either of two models confuses, in ascending order: int64 (P,) each.

    Attributes:
        truth, predicted: the classes.
        first, second: images that each model confuses so.
    """

    truth: np.ndarray
    predicted: np.ndarray
    first: np.ndarray
    second: np.ndarray


def confusions(first: Predictions, second: Predictions) -> Confusions:
    """Count each model's wrong predictions by pair of classes. Of 20,000 classes there are 400 million pairs, most never confused."""
    wrong = [np.column_stack([each.labels, each.predicted])[~each.right].astype(np.int64) for each in (first, second)]
    pairs, at = np.unique(np.concatenate(wrong), axis=0, return_inverse=True)
    parts = np.split(at.reshape(-1), [len(wrong[0])])
    return Confusions(*pairs.T, *(np.bincount(part, minlength=len(pairs)) for part in parts))


def _samples(facts: Facts, pair: _Pair, shards: Sequence[Shard]) -> dict[str, list[dict[str, str | None]]]:
    """Images gained and lost by title, those of the student's highest confidence first."""
    changed = {
        "Gained: highest confidence of the student": pair.student.right & ~pair.teacher.right,
        "Lost: highest confidence of the student": pair.teacher.right & ~pair.student.right,
    }
    groups = {}
    for title, chosen in changed.items():
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(-pair.student.confidence[rows], kind="stable")][:_MAX_SHOWN]
        if len(rows):
            groups[title] = [_sample(facts, pair, row, shards) for row in rows.tolist()]
    return groups


def _sample(facts: Facts, pair: _Pair, row: int, shards: Sequence[Shard]) -> dict[str, str | None]:
    key, source = picture(shards, row)
    teacher, student = pair
    truth, before, now = (
        facts.class_name(int(labels[row])) for labels in (teacher.labels, teacher.predicted, student.predicted)
    )
    right = bool(student.right[row])
    verdict = f"{'✓' if right else '✗'} {now} {student.confidence[row]:.2f}; was {before}"
    alt = f"{key}: is {truth}; the teacher says {before}, the student {now}"
    return sample(source, right, title=key, alt=alt, words=truth, verdict=verdict)
