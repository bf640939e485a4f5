"""stage=evaluate: teacher and student on the test images, which nothing else reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from data import storage
from data.label_files import read_labels, read_manifest
from data.manifest import Split, open_split, write_table
from data.reader import check_labeled
from pipeline.fields import Config
from pipeline.generations import summarize
from pipeline.layout import Layout
from pipeline.models.factory import count_flops, count_parameters
from pipeline.robustness import IMAGES_PER_PART, measure_robustness
from pipeline.speed import measure_speed, read_speed, write_speed
from pipeline.stage import (
    Fingerprint,
    Stage,
    StageError,
    config_differences,
    done_record,
    open_stage,
    recorded_seconds,
    require_done,
)
from pipeline.training.calibration import calibration_error, softmax
from pipeline.training.inference import Predictor, predict_split, top_k_accuracy
from pipeline.training.published import load_predictor, read_info
from pipeline.upstream import require_same_classes

SUMMARY_NAME = "summary.json"
PREDICTIONS_NAME = "predictions.parquet"
ROBUSTNESS_FOLDER = "robustness"


def evaluate(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run the stage; returns its done-record, whose summary has `teacher` and `student` with accuracies as fractions.

    Raises:
        StageError: no test shards are configured, or teacher and student are both missing.
    """
    require_test(config)
    folders = {"teacher": layout.teacher, "student": layout.student}
    test = open_split(config.data.test, layout.indexes)
    expected = fingerprint(config, layout, test)
    infos = {role: read_info(folder) for role, folder in folders.items() if role in expected.inputs}
    for role, info in infos.items():  # before the old figures are moved aside
        require_same_classes(info.class_names, f"the {role}", test.class_names, "data.test")
        check_labeled(test, info.num_classes)
    stage = _open(layout, expected, force)
    if stage.is_done:
        return require_done(stage.folder, "evaluate")
    torch.set_num_threads(config.threads)
    summary: dict[str, Any] = {}
    columns: dict[str, np.ndarray] = {}
    for role in infos:
        figures, predicted = _measure(test, load_predictor(folders[role], config.resolved_device()))
        summary[role] = figures
        columns |= {f"{role}_{name}": values for name, values in predicted.items()}
    labels = np.concatenate([shard.index().column("label").to_numpy() for shard in test.shards])
    write_table(stage.path(PREDICTIONS_NAME), pa.table({"label": labels} | columns))
    files, robustness = _robustness(config, stage, test, {role: folders[role] for role in infos})
    for role, figures in robustness.items():
        summary[role]["robustness"] = figures
    write_speed(
        layout, measure_speed({role: folders[role] for role in infos}, config.resolved_device(), config.threads)
    )
    stage.commit([PREDICTIONS_NAME, *files], summary)
    return require_done(stage.folder, "evaluate")


def _robustness(
    config: Config, stage: Stage, test: Split, folders: Mapping[str, str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Files and figures, per role, of the measurement under corruptions; nothing when it is not asked for."""
    if not config.evaluate.robustness_images:
        return [], {}
    models = {
        role: load_predictor(folder, config.resolved_device(), IMAGES_PER_PART, fast=True)
        for role, folder in folders.items()
    }
    names, figures = measure_robustness(
        test, models, stage.path(ROBUSTNESS_FOLDER), config.evaluate.robustness_images, config.seed
    )
    return [f"{ROBUSTNESS_FOLDER}/{name}" for name in names], figures


def require_test(config: Config) -> None:
    """Raises StageError without test shards."""
    if not config.data.test:
        raise StageError("data.test is empty; give labeled test shards to evaluate on")


def fingerprint(config: Config, layout: Layout, test: Split) -> Fingerprint:
    """What the figures depend on: the test images and the models that are done. Raises StageError when none is."""
    folders = {"teacher": layout.teacher, "student": layout.student}
    digests = {role: record["digest"] for role, folder in folders.items() if (record := done_record(folder))}
    if not digests:
        require_done(layout.teacher, "teacher")
    return Fingerprint(config.stage_fields("evaluate"), {"test": test.digest()} | digests)


def is_outdated(layout: Layout, expected: Fingerprint) -> bool:
    """Whether the old figures are of other models or images, or of another number of corrupted ones.

    Evaluating again is then no change of mind: the old figures are moved aside.
    """
    record = done_record(layout.evaluation)
    if record is None:
        return False
    recorded = record["fingerprint"]
    changed = config_differences(recorded["config"], expected.config)
    return recorded["inputs"] != expected.inputs or set(changed) == {"evaluate.robustness_images"}


def _open(layout: Layout, expected: Fingerprint, force: bool) -> Stage:
    return open_stage(layout.evaluation, "evaluate", expected, force or is_outdated(layout, expected))


def _measure(test: Split, predictor: Predictor) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures of one model, and its prediction and confidence for each image."""
    logits, labels = predict_split(test, predictor)
    probabilities = softmax(logits, predictor.temperature)
    top1, top5 = top_k_accuracy(logits, labels)
    predicted = logits.argmax(axis=1)
    per_class = [
        float((predicted[labels == label] == label).mean()) if (labels == label).any() else None
        for label in range(logits.shape[1])
    ]
    figures = {
        "top1": top1,
        "top5": top5,
        "images": len(labels),
        "calibration_error": calibration_error(probabilities, labels),
        "temperature": predictor.temperature,
        "per_class_top1": per_class,
        "parameters": count_parameters(predictor.model),
        "flops": count_flops(predictor.model, predictor.config.image_size),
    }
    return figures, {"label": predicted, "confidence": probabilities.max(axis=1)}


def write_summary(config: Config, layout: Layout) -> dict[str, Any]:
    """Write RUN/summary.json from what is done so far, and return it."""
    summary: dict[str, Any] = {}
    if (evaluation := done_record(layout.evaluation)) is not None:
        summary |= _figures(layout, evaluation)
    if (labels := done_record(layout.labels)) is not None:
        summary["labels"] = {key: labels["summary"][key] for key in ("images", "labels", "quarantined")} | _selected(
            config, layout, labels["digest"]
        )
    if config.generations != 1:
        generations = [Layout(layout.run_dir, number) for number in range(1, layout.generation + 1)]
        summary |= {"generations": found} if (found := summarize(generations)) else {}
    summary["seconds"] = seconds_by_stage(layout)
    storage.write_text(storage.join(layout.run_dir, SUMMARY_NAME), json.dumps(summary, indent=1) + "\n")
    return summary


def _figures(layout: Layout, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Of the models that were evaluated and are still there, and what their speed was: others' would be taken for theirs."""
    folders = {"teacher": layout.teacher, "student": layout.student}
    figures = {
        role: evaluation["summary"][role]
        for role, folder in folders.items()
        if role in evaluation["summary"]
        and (record := done_record(folder)) is not None
        and record["digest"] == evaluation["fingerprint"]["inputs"][role]
    }
    if (speed := read_speed(layout)) is None:
        return figures
    models = {role: found for role, found in speed["models"].items() if role in figures}
    return figures | {"speed": speed | {"models": models}}


def seconds_by_stage(layout: Layout) -> dict[str, float]:
    """Wall-clock seconds of the generation's stages, over all their runs."""
    selection = layout.current_selection()
    folders = {
        "teacher": layout.teacher if layout.generation == 1 else None,  # a later teacher is counted as a student
        "label": layout.labels,
        "select": selection,
        "student": layout.student,
        "evaluate": layout.evaluation,
    }
    return {name: recorded_seconds(folder) for name, folder in folders.items() if folder and done_record(folder)}


def _selected(config: Config, layout: Layout, labels_digest: str) -> dict[str, Any]:
    """How many pseudo-labels were kept and, where the truth is known, what part of them is right; nothing of older labels."""
    folder = layout.current_selection()
    record = done_record(folder) if folder else None
    if folder is None or record is None or record["fingerprint"]["inputs"]["labels"] != labels_digest:
        return {}
    figures: dict[str, Any] = {"kept": record["summary"]["kept"]}
    if config.data.truth and storage.exists(config.data.truth):
        figures |= precision(config.data.truth, layout.labels, folder)
    return figures


def precision(truth_url: str, labels_folder: str, selection_folder: str) -> dict[str, float]:
    """`labels_right` and `kept_right`: fractions, among images whose truth is known, of all and of the kept pseudo-labels."""
    truth = read_labels(truth_url)
    shard_of, ordinals, answers = (truth.column(name) for name in ("shard", "ordinal", "label"))
    counts = np.zeros(4, np.int64)
    for entry in read_manifest(labels_folder):
        here = pc.equal(shard_of, entry.name)
        known = dict(zip(ordinals.filter(here).to_pylist(), answers.filter(here).to_pylist(), strict=True))
        labels = read_labels(storage.join(labels_folder, f"{entry.name}.parquet"), ["ordinal", "label"])
        copies = read_labels(storage.join(selection_folder, f"{entry.name}.parquet")).column("copies").to_numpy()
        right_answer = np.array([known.get(ordinal, -1) for ordinal in labels.column("ordinal").to_pylist()], np.int64)
        is_known, is_right = right_answer >= 0, right_answer == labels.column("label").to_numpy()
        is_kept = is_known & (copies > 0)
        counts += [is_known.sum(), is_right.sum(), is_kept.sum(), (is_right & is_kept).sum()]
    num_known, num_right, num_kept, num_kept_right = counts.tolist()
    return {"labels_right": num_right / max(num_known, 1), "kept_right": num_kept_right / max(num_kept, 1)}
