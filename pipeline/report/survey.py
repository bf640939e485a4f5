"""What the report says of pseudo-labels: one pass over the label files, shard by shard, in little memory."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data import storage
from data.labels.label_files import LabeledShard, copies_digests, read_copies, read_labels, read_labels_manifest
from data.shards.image_reader import places_of
from data.tables import read_table
from pipeline.core.stage import StageError
from pipeline.report.facts import Generation
from pipeline.report.pictures import thumbnail_at

CONFIDENCE_BINS = 40
NUM_DRAWN, NUM_LEAST = 24, 12
UNKNOWN, RIGHT, WRONG = 0, 1, 2  # what the truth says of a label
_THREADS = 2

Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]  # shard → ordinals, labels


class Shown(NamedTuple):
    """A pseudo-label to show; sorts by `rank`."""

    rank: float
    shard: str
    row: int  # in the label file
    label: int
    confidence: float
    truth: int  # −1: not known


@dataclass(frozen=True)
class Survey:
    """Counts over labels, and a few of them.

    Attributes:
        counts: (2, 3, CONFIDENCE_BINS) int64 by kept or not, verdict (UNKNOWN, RIGHT, WRONG) and confidence.
        kept_by_class: (3, C) int64 kept labels by verdict and class.
        above: (3,) int64 labels at or above their class's threshold by verdict.
        confidence_of_all, confidence_of_kept: sums.
        drawn: kept ones, drawn at random.
        least: the least confident kept ones, at most one per class.
        first_out: the most confident ones below their class's cut-off, at most one per class.
    """

    counts: np.ndarray
    kept_by_class: np.ndarray
    above: np.ndarray
    confidence_of_all: float
    confidence_of_kept: float
    drawn: list[Shown]
    least: list[Shown]
    first_out: list[Shown]

    @property
    def num_labels(self) -> int:
        """All of them."""
        return int(self.counts.sum())

    def right_fraction(self, kept_only: bool) -> float | None:
        """Part of the labels (or the kept ones) that is right, among those whose truth is known; None without any."""
        counts = self.counts[1:] if kept_only else self.counts
        right, wrong = (int(counts[:, verdict].sum()) for verdict in (RIGHT, WRONG))
        return right / (right + wrong) if right + wrong else None


@dataclass(frozen=True)
class Picture:
    """A pseudo-label with its image."""

    shown: Shown
    key: str
    data_uri: str | None  # None: the image cannot be read any more


@dataclass(frozen=True)
class Limits:
    """Of a selection, float32 (C,) each: no label below the threshold is used, and none below the cut-off is kept."""

    threshold: np.ndarray
    cut_off: np.ndarray

    @staticmethod
    def of(selection: Mapping[str, Any] | None, num_classes: int) -> Limits:
        """What a selection.json says; without one, nothing is cut off."""
        if selection is None:
            return Limits(np.zeros(num_classes, np.float32), np.zeros(num_classes, np.float32))
        rule, classes = selection["rule"], selection["classes"]
        thresholds = rule["class_thresholds"] or [rule["confidence_threshold"]] * num_classes
        return Limits(*(np.array(v, np.float32) for v in (thresholds, [e["cut_off"]["confidence"] for e in classes])))


def survey_labels(generation: Generation, truth: Truth, seed: int, limits: Limits) -> Survey:
    """Read label, confidence and copies of every pseudo-label of a generation.

    Args:
        limits: of its selection.
        truth: may be empty, or know some shards and ordinals only.
        seed: of the drawn sample.

    Raises:
        StageError: a label or selection file is missing.
        DataError: one is damaged, or not the one that was committed.
    """
    num_classes = generation.records["label"]["summary"]["num_classes"]
    entries = read_labels_manifest(generation.layout.labels)
    record = generation.records.get("select")
    selection = generation.selection_folder if record is not None else None
    copies = copies_digests(record) if record is not None else {}

    def survey(name: str) -> Survey:
        read = _read_shard(generation.layout.labels, entries[name], selection, copies.get(name))
        return _survey_shard(*read, truth, num_classes, seed, limits, name)

    total = Survey(
        np.zeros((2, 3, CONFIDENCE_BINS), np.int64), np.zeros((3, num_classes), np.int64), np.zeros(3, np.int64), 0.0, 0.0, [], [], []
    )  # fmt: skip
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in tqdm(
            pool.map(survey, entries), total=len(entries), desc="report: labels", unit="shard", delay=5, leave=False
        ):
            total = _merge(total, part)
    return total


def read_truth(url: str | None) -> Truth:
    """The truth file by shard; empty when none is configured. Raises StageError when it is not there."""
    if url is None:
        return {}
    if not storage.exists(url):
        raise StageError(
            f"data.truth={url}: no such file; expected Parquet of (shard, ordinal, label), or data.truth=null"
        )
    remedy = "data.truth must be Parquet of (shard, ordinal, label), or null"
    table = read_table(url, remedy, ["shard", "ordinal", "label"]).sort_by("shard")
    ordinals, labels = table.column("ordinal").to_numpy(), table.column("label").to_numpy()
    names, starts = np.unique(table.column("shard").to_numpy(zero_copy_only=False).astype(str), return_index=True)
    ends = [*starts[1:], len(labels)]
    return {str(name): (ordinals[a:b], labels[a:b]) for name, a, b in zip(names, starts, ends, strict=True)}


def load_pictures(labels_folder: str, unlabeled: Sequence[str], shown: Sequence[Shown]) -> list[Picture]:
    """Read the images of pseudo-labels from their shards; where a shard is not there any more, without the image.

    Args:
        unlabeled: patterns of the unlabeled shards.
    """
    try:
        urls = {storage.base_name(url).removesuffix(".tar"): url for url in storage.expand(unlabeled)}
    except storage.MissingError:
        urls = {}
    entries = read_labels_manifest(labels_folder)
    return [_load_picture(labels_folder, entries[item.shard], urls.get(item.shard), item) for item in shown]


def _load_picture(labels_folder: str, entry: LabeledShard, url: str | None, shown: Shown) -> Picture:
    columns = ["ordinal", "__key__", "offset", "size"]
    table = read_labels(storage.join(labels_folder, f"{shown.shard}.parquet"), columns, entry)
    (place,) = places_of(table.slice(shown.row, 1))
    return Picture(shown, place.key, url and thumbnail_at(url, place))


def _read_shard(
    labels_folder: str, entry: LabeledShard, selection_folder: str | None, copies_digest: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ordinal, label, confidence, and whether it is kept, of a shard's label rows."""
    columns = ["ordinal", "label", "confidence"]
    try:
        table = read_labels(storage.join(labels_folder, f"{entry.name}.parquet"), columns, entry)
        ordinal, label, confidence = (table.column(column).to_numpy() for column in columns)
        kept = np.zeros(len(label), bool)
        if selection_folder is not None:
            kept = read_copies(storage.join(selection_folder, f"{entry.name}.parquet"), copies_digest) > 0
    except FileNotFoundError as error:
        raise StageError(
            f"{error.filename or entry.name}: a file of labels or of the selection is missing; run stage=label again"
        ) from error
    if len(kept) != len(label):
        raise StageError(f"{selection_folder}/{entry.name}.parquet is of other labels; run stage=select again")
    return ordinal, label, confidence, kept


def _survey_shard(
    ordinal: np.ndarray,
    label: np.ndarray,
    confidence: np.ndarray,
    kept: np.ndarray,
    truth: Truth,
    num_classes: int,
    seed: int,
    limits: Limits,
    name: str,
) -> Survey:
    answers = _answers(ordinal, truth.get(name))
    verdict = np.where(answers < 0, UNKNOWN, np.where(answers == label, RIGHT, WRONG))
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    cell = (kept * 3 + verdict) * CONFIDENCE_BINS + bins
    counts = np.bincount(cell, minlength=6 * CONFIDENCE_BINS).reshape(2, 3, CONFIDENCE_BINS)
    classes = np.bincount(verdict[kept] * num_classes + label[kept], minlength=3 * num_classes).reshape(3, num_classes)

    def show(rows: np.ndarray, ranks: np.ndarray) -> list[Shown]:
        columns = (rows, label[rows], confidence[rows], answers[rows])
        values = zip(ranks.tolist(), *(column.tolist() for column in columns), strict=True)
        return [Shown(rank, name, *rest) for rank, *rest in values]

    rows = np.flatnonzero(kept)
    ranks = np.random.default_rng([seed, zlib.crc32(name.encode())]).random(len(rows))
    drawn = np.argsort(ranks)[:NUM_DRAWN]
    least = _first_of_classes(rows, label, confidence)
    below = np.flatnonzero(~kept & (confidence >= limits.threshold[label]) & (confidence <= limits.cut_off[label]))
    first_out = _first_of_classes(below, label, limits.cut_off[label] - confidence)
    return Survey(
        counts,
        classes,
        np.bincount(verdict[confidence >= limits.threshold[label]], minlength=3),
        float(confidence.sum(dtype=np.float64)),
        float(confidence[kept].sum(dtype=np.float64)),
        show(rows[drawn], ranks[drawn]),
        show(least, confidence[least]),
        show(first_out, (limits.cut_off[label] - confidence)[first_out]),
    )


def _first_of_classes(rows: np.ndarray, label: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """Of `rows`, each class's first one by rank, for the NUM_LEAST classes where that is lowest."""
    ordered = rows[np.argsort(rank[rows], kind="stable")]
    first = np.sort(np.unique(label[ordered], return_index=True)[1])
    return ordered[first[:NUM_LEAST]]


def _answers(ordinal: np.ndarray, known: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """The true label of each ordinal, −1 where it is not known."""
    answers = np.full(len(ordinal), -1, np.int64)
    if known is not None and len(known[0]):
        order = np.argsort(known[0], kind="stable")
        ordinals, labels = known[0][order], known[1][order]
        place = np.minimum(np.searchsorted(ordinals, ordinal), len(ordinals) - 1)
        answers = np.where(ordinals[place] == ordinal, labels[place], -1)
    return answers


def _merge(one: Survey, two: Survey) -> Survey:
    return Survey(
        one.counts + two.counts,
        one.kept_by_class + two.kept_by_class,
        one.above + two.above,
        one.confidence_of_all + two.confidence_of_all,
        one.confidence_of_kept + two.confidence_of_kept,
        sorted([*one.drawn, *two.drawn])[:NUM_DRAWN],
        _merge_first(one.least, two.least),
        _merge_first(one.first_out, two.first_out),
    )


def _merge_first(one: list[Shown], two: list[Shown]) -> list[Shown]:
    first: dict[int, Shown] = {}
    for item in sorted([*one, *two]):
        first.setdefault(item.label, item)
    return list(first.values())[:NUM_LEAST]
