"""Is the teacher what its weights say, and how right are its labels? Asked of the validation images, before it labels for days."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from data.manifest import Split, open_split, write_table
from data.reader import check_labeled
from pipeline.fields import Config
from pipeline.layout import Layout
from pipeline.models.weights import WeightsInfo
from pipeline.stage import StageError
from pipeline.training.inference import predict_all, predict_split, top_k_accuracy
from pipeline.training.published import load_labeling_predictor, load_predictor
from pipeline.upstream import require_same_classes

_SCHEMA = pa.schema(
    [("label", pa.int32()), ("predicted", pa.int32()), ("confidence", pa.float32())]  # the truth, and the teacher's
)


def check_teacher(config: Config, layout: Layout, info: WeightsInfo, url: str) -> dict[str, float] | None:
    """Compare the teacher's accuracy on the validation images with what its weights say of themselves: a pass that runs with the
    wrong weights or preprocessing is found before it costs days. Then label these images just as the unlabeled ones will be, and
    write what came out to `url` (no rows without validation images).

    Returns:
        Expected and found top-1, or None when there is nothing to compare.

    Raises:
        StageError: the accuracy is lower than expected, or the classes are not the labeled set's.
        DataError: validation shards that are not right.
    """
    if not config.data.validation:
        write_table(url, _SCHEMA.empty_table())
        return None
    split = open_split(config.data.validation, layout.indexes)
    require_same_classes(info.class_names, "the teacher", split.class_names, "data.validation")
    check_labeled(split, info.num_classes)
    torch.set_num_threads(config.threads)
    result = _compare(config, layout, info, split)
    write_table(url, _label(config, layout, split, result))
    return result


def _compare(config: Config, layout: Layout, info: WeightsInfo, split: Split) -> dict[str, float] | None:
    """Expected and found top-1 of the teacher alone, on one view."""
    elsewhere = layout.generation == 1 and config.teacher.weights is not None
    # what we measured of weights from elsewhere came through the same preprocessing and would always agree
    expected = config.teacher.expected_top1 if elsewhere else info.validation_top1
    if expected is None:
        return None
    logits, labels = predict_split(
        split, load_predictor(layout.teacher, config.resolved_device(), decoder=config.label.decoder)
    )
    found = top_k_accuracy(logits, labels)[0]
    if found < expected - config.teacher.accuracy_tolerance:
        raise StageError(
            f"{layout.teacher}: top-1 {found:.3f} on data.validation, but {expected:.3f} was expected: wrong weights, classes or "
            "preprocessing (teacher.image_size, crop_pct, mean, std). Mend that, or set teacher.expected_top1"
        )
    return {"expected_top1": expected, "found_top1": found}


def _label(config: Config, layout: Layout, split: Split, alone: dict[str, float] | None) -> pa.Table:
    """The rows of `validation.parquet`. Says so when views or an ensemble make the labels worse."""
    folders = [layout.teacher, *config.teacher.ensemble]
    predictor = load_labeling_predictor(folders, config.label, config.resolved_device())
    probabilities, labels = predict_all(split, predictor.view, predictor.batch_size, predictor.probabilities)
    predicted = probabilities.argmax(axis=1)
    right = float((predicted == labels).mean())
    if alone is not None and right < alone["found_top1"] - config.teacher.accuracy_tolerance:
        print(
            f"label: as it labels (label.views={config.label.views}, {len(folders)} teachers), top-1 on data.validation is "
            f"{right:.3f}, but {alone['found_top1']:.3f} on one view by the teacher alone: fewer views or teachers may be better"
        )
    columns = [labels.astype(np.int32), predicted.astype(np.int32), probabilities.max(axis=1).astype(np.float32)]
    return pa.table(columns, schema=_SCHEMA)
