"""Check the teacher on the validation images before it labels for days: its accuracy, and the accuracy of its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from timm.utils.misc import natural_key

from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from data.tables import write_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError
from pipeline.inference.accuracy import Accuracy
from pipeline.inference.ensemble import load_labeling_predictor
from pipeline.inference.predictor import Predicted, count_right, predict_sampled
from pipeline.inference.stage_weights import load_predictor
from pipeline.models.weights import WeightsInfo
from pipeline.upstream.stage_inputs import require_same_classes
from teacher.labeling.label_calibration import calibrate_labels

_SCHEMA = pa.schema(
    [("label", pa.int32()), ("predicted", pa.int32()), ("confidence", pa.float32())]  # label: the true one
)
_MAX_NAMED, _THREADS = 3, 2  # classes in a message; that decode
LABELS_TEMPERATURE = "labels_temperature"
OF_LABELS_ALONE = (LABELS_TEMPERATURE, "labels_calibration_error_before", "labels_calibration_error_after")
"""Entries of a check's result that say how labels that are a mean were calibrated."""


def check_teacher(
    config: Config, layout: Layout, info: WeightsInfo, url: str, accept_chance: bool = False, calibrates: bool = False
) -> dict[str, Any] | None:
    """Find wrong weights, preprocessing or class order.

    1. Compare the teacher's accuracy on the validation images with the one recorded in its weights, or `teacher.expected_top1`.
    2. Label these images as the unlabeled ones will be (views, ensemble, their temperature) and write the labels to `url`; no rows
       without validation images.
    3. Refuse a teacher whose labels are no better than chance.

    Args:
        accept_chance: accept such a teacher.
        calibrates: fit a temperature for labels that are a mean; see `label_calibration`.

    Returns:
        `labels_top1`: accuracy of the labels; with `calibrates`, the entries of OF_LABELS_ALONE; `expected_top1`, `found_top1`: of
        the teacher alone, if an accuracy is expected; `accepted`: why the teacher would have been refused. None without validation
        images.

    Raises:
        StageError: the accuracy is lower than expected or no better than chance, or the classes are not the labeled set's.
        DataError: validation shards are missing, damaged or unlabeled.
    """
    if not config.data.validation:
        write_table(url, _SCHEMA.empty_table())
        return None
    split = open_split(config.data.validation, layout.indexes)
    require_same_classes(info.class_names, "the teacher", split.class_names, "data.validation")
    check_labeled(split, info.num_classes)
    torch.set_num_threads(config.threads)
    alone = _compare(config, layout, info, split)
    table, fitted = _label(config, layout, split, alone, calibrates)
    found = Accuracy(*(table.column(name).to_numpy() for name in ("label", "predicted")))
    print(f"label: as the teacher labels, {found.describe(split.class_names)}", flush=True)
    result: dict[str, Any] = {"labels_top1": found.top1} | fitted | (alone or {})
    if problem := problem_of_labels(config, layout, found, split.class_names):
        if not accept_chance:
            raise StageError(f"{layout.teacher}: {problem}; or to label with it anyway, run stage=label force=true")
        print(f"label: {problem}; accepted, as asked for")
        result["accepted"] = problem
    write_table(url, table)
    return result


def problem_of_labels(config: Config, layout: Layout, found: Accuracy, class_names: Sequence[str] | None) -> str:
    """Why these labels are probably wrong; empty if they are not. Part of the labels' manifest if accepted."""
    elsewhere = layout.generation == 1 and config.teacher.weights is not None
    if elsewhere and class_names and (order := _better_order(found, class_names)):
        return order
    if not found.at_chance:
        return ""
    head = (
        f"its labels are no better than chance: top-1 {found.top1:.1%} ({found.right:,} of {found.images:,} validation images), where "
        f"the same answers dealt out at random have {found.chance:.1%}"
    )
    if not elsewhere:
        return f"{head}; train it again, for longer or with a lower learning rate, or check the labels of data.labeled"
    return (
        f"{head}. Check that teacher.weights are the right ones, that the preprocessing is theirs (teacher.image_size, crop_pct, "
        "interpolation, mean, std), and that their classes are in the data's order (timm sorts class folders naturally and without "
        "case: 1, 2, 10; give their names as teacher.class_names=FILE, one a line)"
    )


def _better_order(found: Accuracy, class_names: Sequence[str]) -> str:
    """Whether the predictions are right more often in another order of the classes that training tools use; empty if not."""
    position = {name: place for place, name in enumerate(class_names)}
    for whose, order in _other_orders(class_names):
        other = Accuracy(found.labels, np.array([position[name] for name in order])[found.predicted])
        if other.better_than(found) and not other.at_chance:
            some = next(place for place, (one, two) in enumerate(zip(order, class_names, strict=True)) if one != two)
            return (
                f"the classes of teacher.weights seem to be in another order than the data's: top-1 {found.top1:.1%} as they are, "
                f"{other.top1:.1%} when sorted {whose} (from class {some} on: "
                f"{', '.join(map(repr, order[some : some + _MAX_NAMED]))}, …); give their names in their order as "
                "teacher.class_names=FILE, one a line, and run stage=teacher force=true"
            )
    return ""


def _other_orders(class_names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(description, class names) of timm's and torchvision's order of class folders, if it is not the data's order."""
    orders = [("as text, as torchvision does", sorted(class_names))]
    with suppress(ValueError):  # digits that are no numbers, as ²: timm cannot sort them either
        orders.insert(0, ("naturally and without case, as timm does", sorted(class_names, key=natural_key)))
    yield from ((whose, order) for whose, order in orders if order != list(class_names))


def _compare(config: Config, layout: Layout, info: WeightsInfo, split: Split) -> dict[str, float] | None:
    """Expected and found top-1 of the teacher alone, on one view; None if none is expected. Raises StageError if it is too low."""
    elsewhere = layout.generation == 1 and config.teacher.weights is not None
    # not `validation_top1` of external weights: it was measured here, with the same preprocessing, and always agrees
    expected = config.teacher.expected_top1 if elsewhere else info.validation_top1
    if expected is None:
        return None
    batch_size = config.training(layout.teacher_stage).eval_batch_size
    predictor = load_predictor(layout.teacher, config.resolved_device(), batch_size, decoder=config.label.decoder)
    right, images = count_right(split, predictor, _THREADS, rank=0, world=1)
    found = right / images
    if found < expected - config.teacher.accuracy_tolerance:
        raise StageError(
            f"{layout.teacher}: expected top-1 {expected:.3f} on data.validation but got {found:.3f}: wrong weights, classes or "
            "preprocessing (teacher.image_size, crop_pct, mean, std). Correct these, or set teacher.expected_top1"
        )
    return {"expected_top1": expected, "found_top1": found}


def _label(
    config: Config, layout: Layout, split: Split, alone: dict[str, float] | None, calibrates: bool
) -> tuple[pa.Table, dict[str, float]]:
    """The rows of `validation.parquet`, and the entries of OF_LABELS_ALONE. Warn if views or an ensemble make the labels worse."""
    folders = [layout.teacher, *config.teacher.ensemble]
    found = _predict(config, folders, split, 1.0)
    right = float((found.predicted == found.labels).mean())
    if alone is not None and right < alone["found_top1"] - config.teacher.accuracy_tolerance:
        print(
            f"label: the labels (label.views={config.label.views}, {len(folders)} teachers) have top-1 {right:.3f} on data.validation, "
            f"the teacher alone on one view {alone['found_top1']:.3f}: fewer views or teachers may be better"
        )
    confidence, fitted = found.highest, {}
    if calibrates:
        fit = calibrate_labels(found.scores, found.scored_labels)
        fitted = dict(zip(OF_LABELS_ALONE, (fit.temperature, fit.error_before, fit.error_after), strict=True))
        print(
            f"label: the mean over views and teachers has the temperature {fit.temperature:g}: expected calibration error "
            f"{fit.error_before:.3f} before, {fit.error_after:.3f} after"
        )
        is_whole = len(fit.confidence) == len(confidence)
        confidence = fit.confidence if is_whole else _predict(config, folders, split, fit.temperature).highest
    columns = [found.labels.astype(np.int32), found.predicted.astype(np.int32), confidence.astype(np.float32)]
    return pa.table(columns, schema=_SCHEMA), fitted


def _predict(config: Config, folders: Sequence[str], split: Split, temperature: float) -> Predicted:
    """The split as the unlabeled images will be labeled; scores are probabilities."""
    predictor = load_labeling_predictor(folders, config.label, config.resolved_device(), temperature)
    return predict_sampled(split, predictor.view, predictor.batch_size, predictor.probabilities)
