"""Survey pseudo-labels for the report in one pass over the label files, a shard at a time."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data.labels.label_files import COPIES_REMEDY
from data.labels.selected_labels import SelectedLabels
from data.progress_bar import ProgressBar
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import SELECTION_NAME
from pipeline.core.stage import StageError
from pipeline.evaluation.truth import Truth, read_truth, true_labels
from pipeline.report.facts import Facts, Generation

CONFIDENCE_BINS = 40
NUM_DRAWN, NUM_LEAST = 24, 12
UNKNOWN, RIGHT, WRONG = 0, 1, 2  # verdicts on a label
_THREADS = 2


class ShownLabel(NamedTuple):
    """A pseudo-label to show; sorts by `rank`."""

    rank: float
    shard: str
    row: int  # of the label file
    label: int
    confidence: float
    truth: int  # true label; −1 if unknown


@dataclass(frozen=True)
class Survey:
    """Counts over pseudo-labels, and a few labels to show.

    Attributes:
        counts: (2, 3, CONFIDENCE_BINS) int64 by kept or not, verdict (UNKNOWN, RIGHT, WRONG) and confidence.
        kept_by_class: (3, C) int64 kept labels by verdict and class.
        above: (3,) int64 labels at or above their class's threshold by verdict.
        confidence_of_all, confidence_of_kept: sums of confidences.
        drawn: kept labels, drawn at random.
        least: the least confident kept labels, at most one per class.
        first_out: the most confident labels below their class's cut-off, at most one per class.
    """

    counts: np.ndarray
    kept_by_class: np.ndarray
    above: np.ndarray
    confidence_of_all: float
    confidence_of_kept: float
    drawn: list[ShownLabel]
    least: list[ShownLabel]
    first_out: list[ShownLabel]

    @property
    def num_labels(self) -> int:
        """Number of labels, kept or not."""
        return int(self.counts.sum())

    def right_fraction(self, kept_only: bool) -> float | None:
        """Fraction of labels that are right, among those (or the kept ones) whose truth is known; None if there are none."""
        counts = self.counts[1:] if kept_only else self.counts
        right, wrong = (int(counts[:, verdict].sum()) for verdict in (RIGHT, WRONG))
        return right / (right + wrong) if right + wrong else None


@dataclass(frozen=True)
class SurveyedLabels:
    """A generation's pseudo-labels; `selection` holds its selection.json, None before stage=select."""

    generation: Generation
    selection: dict[str, Any] | None
    survey: Survey


@dataclass(frozen=True)
class Limits:
    """Confidences per class, float32 (C,): no label below `threshold` is eligible, none below `cut_off` is kept."""

    threshold: np.ndarray
    cut_off: np.ndarray

    @staticmethod
    def of(selection: Mapping[str, Any] | None, num_classes: int) -> Limits:
        """Limits of a selection.json; zeros without one."""
        if selection is None:
            return Limits(np.zeros(num_classes, np.float32), np.zeros(num_classes, np.float32))
        rule, classes = selection["rule"], selection["classes"]
        thresholds = rule["class_thresholds"] or [rule["confidence_threshold"]] * num_classes
        return Limits(*(np.array(v, np.float32) for v in (thresholds, [e["cut_off"]["confidence"] for e in classes])))


def survey_generations(facts: Facts) -> list[SurveyedLabels]:
    """Survey each generation that has labels.

    Raises:
        StageError: the truth, a label or a selection file is missing.
        DataError: one is damaged, or not the one that was committed.
    """
    truth = read_truth(facts.config.data, facts.class_names)
    surveyed = []
    for generation in facts.generations:
        if "label" in generation.records:
            selection = _read_selection(generation)
            limits = Limits.of(selection, generation.records["label"]["summary"]["num_classes"])
            survey = survey_labels(generation, truth, facts.config.seed, limits)
            surveyed.append(SurveyedLabels(generation, selection, survey))
    return surveyed


def _read_selection(generation: Generation) -> dict[str, Any] | None:
    if "select" not in generation.records or generation.selection_folder is None:
        return None
    return read_output_json(generation.selection_folder, SELECTION_NAME, generation.records["select"], COPIES_REMEDY)


def survey_labels(generation: Generation, truth: Truth, seed: int, limits: Limits) -> Survey:
    """Read label, confidence and copies of every pseudo-label of a generation.

    Args:
        truth: true labels; may be empty, or know some shards and ordinals only.
        seed: seed of the drawn sample.
        limits: limits of the generation's selection.

    Raises:
        StageError: a label or selection file is missing.
        DataError: one is damaged, or not the one that was committed.
    """
    record = generation.records.get("select")
    selection = generation.selection_folder if record is not None else None
    selected = SelectedLabels.of(generation.layout.labels, selection, record)

    def survey(name: str) -> Survey:
        return _survey_shard(name, _read_shard(selected, name), truth, seed, limits)

    num_classes, bins = generation.records["label"]["summary"]["num_classes"], CONFIDENCE_BINS
    counts, by_class, above = (np.zeros(shape, np.int64) for shape in ((2, 3, bins), (3, num_classes), (3,)))
    total = Survey(counts, by_class, above, 0.0, 0.0, [], [], [])
    with ThreadPoolExecutor(_THREADS) as pool:
        parts, number = pool.map(survey, selected.labeled), len(selected.labeled)
        for part in ProgressBar(parts, total=number, desc="report: labels", unit="shard", delayed=True):
            total = _merge(total, part)
    return total


class _Rows(NamedTuple):
    """The label rows of a shard; (N,) each."""

    ordinal: np.ndarray
    label: np.ndarray
    confidence: np.ndarray
    kept: np.ndarray  # bool


def _read_shard(selected: SelectedLabels, name: str) -> _Rows:
    columns = ["ordinal", "label", "confidence"]
    try:
        rows, copies = selected.read(name, columns)
    except FileNotFoundError as error:
        raise StageError(
            f"{error.filename or name}: file of labels or selection is missing; run stage=label again"
        ) from error
    ordinal, label, confidence = (rows.column(column).to_numpy() for column in columns)
    return _Rows(ordinal, label, confidence, copies > 0)


def _survey_shard(name: str, shard: _Rows, truth: Truth, seed: int, limits: Limits) -> Survey:
    ordinal, label, confidence, kept = shard
    num_classes = len(limits.threshold)
    answers = true_labels(truth, name, ordinal)
    verdict = np.where(answers < 0, UNKNOWN, np.where(answers == label, RIGHT, WRONG))
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
    cell = (kept * 3 + verdict) * CONFIDENCE_BINS + bins
    counts = np.bincount(cell, minlength=6 * CONFIDENCE_BINS).reshape(2, 3, CONFIDENCE_BINS)
    classes = np.bincount(verdict[kept] * num_classes + label[kept], minlength=3 * num_classes).reshape(3, num_classes)

    def show(rows: np.ndarray, ranks: np.ndarray) -> list[ShownLabel]:
        columns = (rows, label[rows], confidence[rows], answers[rows])
        values = zip(ranks.tolist(), *(column.tolist() for column in columns), strict=True)
        return [ShownLabel(rank, name, *rest) for rank, *rest in values]

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
    """Find each class's row of lowest rank, for the NUM_LEAST classes where that rank is lowest."""
    ordered = rows[np.argsort(rank[rows], kind="stable")]
    first = np.sort(np.unique(label[ordered], return_index=True)[1])
    return ordered[first[:NUM_LEAST]]


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


def _merge_first(one: list[ShownLabel], two: list[ShownLabel]) -> list[ShownLabel]:
    first: dict[int, ShownLabel] = {}
    for item in sorted([*one, *two]):
        first.setdefault(item.label, item)
    return list(first.values())[:NUM_LEAST]
