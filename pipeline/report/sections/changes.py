"""The report's section on what the student does otherwise than its teacher: confusions that changed, images gained and lost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data import storage
from data.shards.image_reader import places_in
from data.shards.split import DataError, Shard, open_split
from pipeline.pages.html import heading, paragraph, section, side_by_side, table
from pipeline.report.facts import Facts, Predictions, compare
from pipeline.report.pictures import card, grid, thumbnail_at
from pipeline.report.sections.models import name_of

_MAX_PAIRS, _MAX_SHOWN = 8, 12


def changes_section(facts: Facts) -> str:
    """The last student against the first teacher, on the test images; nothing where there are not both."""
    first, last = facts.models[0], facts.models[-1]
    result = compare(first, last)
    if result is None or first.predictions is None or last.predictions is None or not result.gained + result.lost:
        return ""
    words = (
        f"{result.gained:,} test images that the {first.name} has wrong the {last.name} has right (gained); "
        f"{result.lost:,} the other way round (lost)."
    )
    return section(
        f"What the {last.name} does otherwise",
        paragraph(words),
        _pairs(facts, (first.name, first.predictions), (last.name, last.predictions)),
        *_examples(facts, first.predictions, last.predictions),
    )


def _pairs(facts: Facts, first: tuple[str, Predictions], last: tuple[str, Predictions]) -> str:
    """Which confusions became rarer, and which more frequent."""
    one, two = confusions(first[1], last[1])
    change = two - one
    order = np.argsort(change, axis=None, kind="stable")
    rarer = [flat for flat in order[:_MAX_PAIRS] if change.flat[flat] < 0]
    more = [flat for flat in order[::-1][:_MAX_PAIRS] if change.flat[flat] > 0]
    tables = []
    for caption, chosen in (("Confusions that became rarer", rarer), ("Confusions that became more frequent", more)):
        rows = []
        for flat in chosen:
            truth, said = (int(index) for index in np.unravel_index(flat, change.shape))
            pair = f"{name_of(facts, truth)} taken for {name_of(facts, said)}"
            rows.append([pair, f"{one[truth, said]:,}", f"{two[truth, said]:,}"])
        if rows:
            tables.append(table(["", first[0], last[0]], rows, caption))
    return side_by_side(*tables)


def confusions(first: Predictions, second: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Wrong answers of each by (truth, answer), int64 (C, C)."""
    number = 1 + max(int(values.max()) for values in (first.labels, first.predicted, second.predicted))
    counts = []
    for predictions in (first, second):
        wrong = ~predictions.right
        flat = predictions.labels[wrong].astype(np.int64) * number + predictions.predicted[wrong]
        counts.append(np.bincount(flat, minlength=number**2).reshape(number, number))
    return counts[0], counts[1]


def _examples(facts: Facts, first: Predictions, last: Predictions) -> list[str]:
    """Images gained and lost, those first that the student is surest of."""
    shards = _test_shards(facts, first.test)
    if shards is None:
        return [paragraph("The test images are not there any more, so none is shown.", "soft")]
    parts = []
    for title, chosen in (
        ("Gained: those that the student is surest of", last.right & ~first.right),
        ("Lost: those that the student is surest of, wrongly", first.right & ~last.right),
    ):
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(-last.confidence[rows], kind="stable")][:_MAX_SHOWN]
        if len(rows):
            parts += [heading(title), grid([_card(facts, first, last, row, shards) for row in rows.tolist()])]
    return parts


def _test_shards(facts: Facts, digest: str) -> Sequence[Shard] | None:
    """The shards that were evaluated; None when they are others now, or gone."""
    if not facts.config.data.test:
        return None
    try:
        test = open_split(facts.config.data.test, facts.generations[0].layout.indexes)
    except (DataError, OSError, storage.MissingError):
        return None
    return test.shards if test.digest() == digest else None


def _card(facts: Facts, first: Predictions, last: Predictions, row: int, shards: Sequence[Shard]) -> str:
    key, uri = _picture(shards, row)
    truth, before, now = (name_of(facts, int(p[row])) for p in (first.labels, first.predicted, last.predicted))
    right = bool(last.right[row])
    verdict = f"{'✓' if right else '✗'} {now} {last.confidence[row]:.2f}; was {before}"
    return card(uri, right, key, f"{key}: is {truth}; the teacher says {before}, the student {now}", truth, verdict)


def _picture(shards: Sequence[Shard], row: int) -> tuple[str, str | None]:
    """Key and image of a test image by its position among all."""
    for shard in shards:
        if row < shard.num_samples:
            (place,) = places_in(shard.index().slice(row, 1), row)
            return place.key, thumbnail_at(shard.url, place)
        row -= shard.num_samples
    raise AssertionError("predictions are of the split's images")
