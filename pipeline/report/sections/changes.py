"""Section on where the student differs from its teacher: confusions that changed, images gained and lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data import storage
from data.errors import DataError
from data.shards.image_reader import places_in
from data.shards.split import Shard, open_split
from pipeline.pages.render import Section
from pipeline.report.facts import Facts, Predictions, compare
from pipeline.report.pictures import sample, thumbnail_at

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
    shards = _test_shards(facts, pair.teacher.test)
    values = {
        "models": [first.name, last.name],
        "gained": result.gained,
        "lost": result.lost,
        "confusions": _confusion_tables(facts, pair),
        "groups": _samples(facts, pair, shards) if shards is not None else None,
    }
    return Section("changes.html", values)


def _confusion_tables(facts: Facts, pair: _Pair) -> dict[str, list[list[str]]]:
    """Rows (confusion, by the teacher, by the student) by title; of those that changed most."""
    before, after = confusions(*pair)
    change = after - before
    order = np.argsort(change, axis=None, kind="stable")
    chosen = {
        "Confusions that became rarer": [flat for flat in order[:_MAX_PAIRS] if change.flat[flat] < 0],
        "Confusions that became more frequent": [flat for flat in order[::-1][:_MAX_PAIRS] if change.flat[flat] > 0],
    }

    def row(flat: int) -> list[str]:
        truth, predicted = (int(index) for index in np.unravel_index(flat, change.shape))
        name = f"{facts.class_name(truth)} taken for {facts.class_name(predicted)}"
        return [name, f"{before[truth, predicted]:,}", f"{after[truth, predicted]:,}"]

    return {title: [row(flat) for flat in flats] for title, flats in chosen.items() if flats}


def confusions(first: Predictions, second: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Count each model's wrong predictions by (true class, predicted class), int64 (C, C)."""
    number = 1 + max(int(values.max()) for values in (first.labels, first.predicted, second.predicted))
    counts = []
    for predictions in (first, second):
        wrong = ~predictions.right
        flat = predictions.labels[wrong].astype(np.int64) * number + predictions.predicted[wrong]
        counts.append(np.bincount(flat, minlength=number**2).reshape(number, number))
    return counts[0], counts[1]


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


def _test_shards(facts: Facts, digest: str) -> Sequence[Shard] | None:
    """Open the shards that were evaluated; None if they changed or are gone."""
    if not facts.config.data.test:
        return None
    try:
        test = open_split(facts.config.data.test, facts.generations[0].layout.indexes)
    except (DataError, OSError, storage.MissingError):
        return None
    return test.shards if test.digest() == digest else None


def _sample(facts: Facts, pair: _Pair, row: int, shards: Sequence[Shard]) -> dict[str, str | None]:
    key, source = _picture(shards, row)
    teacher, student = pair
    truth, before, now = (
        facts.class_name(int(labels[row])) for labels in (teacher.labels, teacher.predicted, student.predicted)
    )
    right = bool(student.right[row])
    verdict = f"{'✓' if right else '✗'} {now} {student.confidence[row]:.2f}; was {before}"
    alt = f"{key}: is {truth}; the teacher says {before}, the student {now}"
    return sample(source, right, title=key, alt=alt, words=truth, verdict=verdict)


def _picture(shards: Sequence[Shard], row: int) -> tuple[str, str | None]:
    """Key and data: URI of a test image by its position in the split."""
    for shard in shards:
        if row < shard.num_samples:
            (place,) = places_in(shard.index().slice(row, 1), row)
            return place.key, thumbnail_at(shard.url, place)
        row -= shard.num_samples
    raise AssertionError("predictions are of the split's images")
