"""Which unlabeled images to look at: those whose labels are the least certain, found in the label files without reading an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.labels.exclusions import read_keys
from data.labels.selected_labels import SelectedLabels
from data.labels.top_k import top_k_columns
from data.shards.image_reader import PLACE_COLUMNS, Place, places_of
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError
from pipeline.upstream.stage_inputs import require_labels
from teacher.near_duplicates.stage import read_listing, recorded

_COLUMNS = (*PLACE_COLUMNS, "label", "confidence", "topk_index", "topk_prob")


@dataclass(frozen=True)
class Candidate:
    """An unlabeled image.

    Attributes:
        shard: name.
        label, confidence: the teacher's.
        margin: of its two most probable classes, 0 to 1; 0: undecided.
    """

    shard: str
    place: Place
    label: int
    confidence: float
    margin: float


def find_candidates(config: Config, layout: Layout, number: int) -> list[Candidate]:
    """The `number` labels of the smallest margin, smallest first; equal ones in the shards' order.

    Excluded keys and copies of held-out images are left out. Memory grows with `number`, not with the labels.

    Raises:
        StageError: there are no labels.
        DataError: a label file is damaged.
    """
    labels = require_labels(config, layout)
    excluded, searched = read_keys(config.data.exclude), recorded(config, layout, labels)
    copies = read_listing(searched) if searched is not None else {}
    selected = SelectedLabels.of(layout.labels)
    best: list[Candidate] = []
    for shard in selected.labeled:
        rows, _ = selected.read(shard, _COLUMNS)
        is_out = excluded.mask(shard, rows.column("__key__").combine_chunks())
        is_out |= np.isin(rows.column("ordinal").to_numpy(), copies.get(shard, []))
        below = best[-1].margin if len(best) == number else float("inf")
        best = _smallest([*best, *_of_shard(shard, rows.filter(pa.array(~is_out)), number, below)], number)
    if not best:
        raise StageError(f"{layout.labels}: no label of an image that could be suggested")
    return best


def _of_shard(shard: str, rows: pa.Table, number: int, below: float) -> list[Candidate]:
    """The smallest margins of a shard that are `below` a value: of most shards, few rows become objects."""
    if not rows.num_rows:
        return []
    _, probabilities = top_k_columns(rows)
    margins = probabilities[:, 0].astype(np.float32) - probabilities[:, 1]
    chosen = np.argsort(margins, kind="stable")[:number]
    chosen = chosen[margins[chosen] < below]
    some = rows.take(chosen)
    columns = (some.column(name).to_pylist() for name in ("label", "confidence"))
    items = zip(places_of(some), *columns, margins[chosen].tolist(), strict=True)
    return [Candidate(shard, place, label, confidence, margin) for place, label, confidence, margin in items]


def _smallest(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    return sorted(candidates, key=lambda each: each.margin)[:number]
