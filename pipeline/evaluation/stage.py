"""stage=evaluate: measure teacher and student on the test images. No earlier stage reads them; the report shows a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from data.tables import write_table
from pipeline.core.devices import call_on_device, require_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import (
    Fingerprint,
    config_differences,
    done_record,
    open_stage,
    require_done,
    with_recorded_device,
)
from pipeline.evaluation.known import PREDICTIONS_NAME, ROBUSTNESS_FOLDER, Evaluated, find_evaluated
from pipeline.evaluation.robustness import IMAGES_PER_PART, measure_robustness
from pipeline.evaluation.speed import measure_speed
from pipeline.evaluation.summary import write_speed
from pipeline.inference.accuracy import label_ranks, share_within
from pipeline.inference.calibration import calibration_error, confidences
from pipeline.inference.predictor import Predictor, predict_batches
from pipeline.inference.stage_weights import load_predictor, read_info, weights_folder
from pipeline.inference.weights_card import write_weights_card
from pipeline.models.registry import count_flops, count_parameters
from pipeline.upstream.stage_inputs import require_same_classes, require_test

_TOP = 5


def evaluate(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run the stage; returns its done-record, whose summary has `teacher` and `student` with accuracies as fractions.

    Raises StageError when no test shards are configured, or teacher and student are both missing.
    """
    require_test(config)
    test = open_split(config.data.test, layout.indexes)
    expected = fingerprint(config, layout, test)
    folders = {role: folder for role, folder in layout.models.items() if role in expected.inputs}
    infos = {role: read_info(folder) for role, folder in folders.items()}
    for role, info in infos.items():  # before the old figures are moved aside
        require_same_classes(info.class_names, f"the {role}", test.class_names, "data.test")
        check_labeled(test, info.num_classes)
    starts_over, address = force or is_outdated(layout, expected), config.ray_address
    stage = open_stage(
        layout.evaluation,
        "evaluate",
        expected,
        starts_over,
        check=lambda: require_device(config.resolved_device(), address),
    )
    if stage.is_done:
        return require_done(stage.folder, "evaluate")
    known = {} if force else find_evaluated(layout, expected)
    for role, evaluated in known.items():
        print(
            f"evaluate: the {role} was evaluated on these images in {evaluated.folder}; its figures are taken from there"
        )
    device, batch_size = config.resolved_device(), config.evaluate.batch_size
    summary, columns = _figures(config, test, folders, known)
    labels = np.concatenate([shard.index().column("label").to_numpy() for shard in test.shards])
    write_table(stage.path(PREDICTIONS_NAME), pa.table({"label": labels} | columns))
    to = stage.path(ROBUSTNESS_FOLDER)
    wrong = {role: parts for role, found in known.items() if (parts := found.wrong_by_part()) is not None}
    files, robustness = call_on_device(device, address, _robustness, config, to, test, folders, wrong)
    for role, figures in robustness.items():
        summary[role]["robustness"] = figures
    speed = call_on_device(device, address, measure_speed, folders, device, config.threads, batch_size)
    write_speed(layout.evaluation, speed)
    stage.commit([PREDICTIONS_NAME, *files], summary)
    for role, info in infos.items():
        if not layout.takes(role):  # the other run stays as it is
            write_weights_card(weights_folder(folders[role]), info, summary[role])
    return require_done(stage.folder, "evaluate")


def _figures(
    config: Config, test: Split, folders: Mapping[str, str], known: Mapping[str, Evaluated]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `_measure_models`; of models in `known`, what was measured before."""
    device, new = config.resolved_device(), {role: folder for role, folder in folders.items() if role not in known}
    fields = device, config.threads, config.evaluate.batch_size
    measured, columns = (
        call_on_device(device, config.ray_address, _measure_models, test, new, *fields) if new else ({}, {})
    )
    for role, found in known.items():
        measured[role] = found.figures()
        columns |= {f"{role}_{name}": values for name, values in found.predictions().items()}
    order = [f"{role}_{name}" for role in folders for name in ("label", "confidence")]
    return {role: measured[role] for role in folders}, {name: columns[name] for name in order}


def _measure_models(
    test: Split, folders: Mapping[str, str], device: str, threads: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures per role, and columns of the table of predictions."""
    torch.set_num_threads(threads)
    figures: dict[str, Any] = {}
    columns: dict[str, np.ndarray] = {}
    for role, folder in folders.items():
        predictor, num_classes = load_predictor(folder, device, batch_size), read_info(folder).num_classes
        figures[role], predicted = _measure(test, predictor, num_classes)
        columns |= {f"{role}_{name}": values for name, values in predicted.items()}
    return figures, columns


def _robustness(
    config: Config, to: str, test: Split, folders: Mapping[str, str], known: Mapping[str, list[list[int]]]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Names of files in the folder `to`, and figures per role, under corruptions; empty with evaluate.robustness_images=0.

    Args:
        known: role → wrong answers by part, as `Evaluated.wrong_by_part`.
    """
    if not config.evaluate.robustness_images:
        return [], {}
    torch.set_num_threads(config.threads)
    batch_size = min(IMAGES_PER_PART, config.evaluate.batch_size)
    models = {
        role: load_predictor(folder, config.resolved_device(), batch_size, fast=True)
        for role, folder in folders.items()
        if role not in known
    }
    number = config.evaluate.robustness_images
    names, figures = measure_robustness(test, models, to, number, config.seed, known, list(folders))
    return [f"{ROBUSTNESS_FOLDER}/{name}" for name in names], figures


def fingerprint(config: Config, layout: Layout, test: Split) -> Fingerprint:
    """All that the figures depend on: the settings, the test images and the finished models. Raises StageError when none is done."""
    digests = {role: record["digest"] for role, folder in layout.models.items() if (record := done_record(folder))}
    if not digests:
        require_done(layout.teacher, "teacher")
    found = Fingerprint(config.stage_fields("evaluate"), {"test": test.digest()} | digests)
    return with_recorded_device(found, layout.evaluation)


def is_outdated(layout: Layout, expected: Fingerprint) -> bool:
    """Whether the figures there are of other models or images, or of another number of corrupted images.

    These are then moved aside without force=true.
    """
    record = done_record(layout.evaluation)
    if record is None:
        return False
    recorded = record["fingerprint"]
    changed = config_differences(recorded["config"], expected.config)
    return recorded["inputs"] != expected.inputs or set(changed) == {"evaluate.robustness_images"}


def _measure(test: Split, predictor: Predictor, num_classes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One model's figures, and its (N,) predicted labels and confidences. Logits are held for a batch at a time."""
    batches = predict_batches(test, predictor.view, predictor.batch_size, predictor.logits)
    parts = zip(*(_judged(*batch, predictor.temperature) for batch in batches), strict=True)
    labels, predicted, ranked, confidence, is_right = map(np.concatenate, parts)
    count, right = (np.bincount(some, minlength=num_classes) for some in (labels, labels[predicted == labels]))
    per_class = [hits / images if images else None for hits, images in zip(right.tolist(), count.tolist(), strict=True)]
    figures = {
        "top1": share_within(ranked, 1),
        "top5": share_within(ranked, 5),
        "images": len(labels),
        "calibration_error": calibration_error(confidence, is_right),
        "temperature": predictor.temperature,
        "per_class_top1": per_class,
        "parameters": count_parameters(predictor.model),
        "flops": count_flops(predictor.model, predictor.preprocessing.view_shape),
    }
    return figures, {"label": predicted, "confidence": confidence}


def _judged(logits: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    """Of a batch: labels, predicted labels, `label_ranks`, confidences, and whether the most probable class is the label's."""
    return labels, logits.argmax(axis=1), label_ranks(logits, labels, _TOP), *confidences(logits, labels, temperature)
