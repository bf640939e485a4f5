"""stage=student: a noised, usually larger model on labeled and pseudo-labeled images together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.labels.exclusions import exclude_inputs
from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from pipeline.core.devices import require_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, open_stage, require_done
from pipeline.inference.commit_weights import TrainedModel, commit_weights
from pipeline.models.initial_weights import init_digest
from pipeline.training.job import TrainJob, job_from_config
from pipeline.training.launch import run_training
from pipeline.training.metrics_log import METRICS_NAME
from pipeline.training.state import load_trained
from pipeline.upstream.stage_inputs import (
    explain_inputs,
    require_labels,
    require_same_classes,
    require_selection,
)
from student.fix_resolution import FOLDER, fix_resolution_job
from student.streams import mixed_streams
from student.warm_start import begin_student, warn_of_smaller_student


def train_student(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; return its done-record.

    Raises:
        StageError: the stage refuses, an earlier one is not done or was made from other inputs, or there are no labeled images.
        DataError: the labeled shards have no usable labels, or are damaged.
    """
    require_labeled(config)
    labeled = open_split(config.data.labeled, layout.indexes)
    validation = open_split(config.data.validation, layout.indexes) if config.data.validation else None
    labels = require_labels(config, layout)
    selection_folder, selection = require_selection(config, layout, labels)
    expected = fingerprint(config, labeled, validation, labels, selection)
    num_classes, class_names = labels["summary"]["num_classes"], labels["summary"]["class_names"]
    prepared: list[TrainJob] = []

    def check() -> None:
        require_device(config.resolved_device(), config.ray_address)  # calibration needs it after the training
        require_same_classes(class_names, "the teacher", labeled.class_names, "data.labeled")
        for split in (labeled, validation):
            if split is not None:
                check_labeled(split, num_classes)
        streams = mixed_streams(config, layout, labeled, selection_folder)
        initial = begin_student(config, layout, num_classes, class_names)
        prepared.append(job_from_config(config, "student", layout.student, streams, num_classes, validation, initial))

    stage = open_stage(layout.student, "student", expected, force, explain_inputs(layout), check)
    if stage.is_done:
        return require_done(layout.student, "student")
    warn_of_smaller_student(config, layout, num_classes)
    (job,) = prepared
    jobs = [job] if (fixing := fix_resolution_job(job, config.student)) is None else [job, fixing]
    for part in jobs:
        run_training(part, config.ray_address)
    last = jobs[-1]
    state, _ = load_trained(last)
    metrics = (METRICS_NAME, f"{FOLDER}/{METRICS_NAME}")[: len(jobs)]
    trained = TrainedModel(last.config, state, num_classes, class_names, layout.generation)
    commit_weights(stage, trained, config, validation, metrics, {"steps": sum(part.total_steps for part in jobs)})
    return require_done(layout.student, "student")


def require_labeled(config: Config) -> None:
    """Raise StageError without labeled shards."""
    if not config.data.labeled:
        raise StageError("data.labeled is empty; the student trains on labeled and pseudo-labeled images together")


def fingerprint(
    config: Config, labeled: Split, validation: Split | None, labels: Mapping[str, Any], selection: Mapping[str, Any]
) -> Fingerprint:
    """What the student depends on: its config fields, labeled and validation images, excluded keys, labels, selection, first weights.

    Args:
        labels, selection: their done-records.

    Raises:
        DataError: data.exclude cannot be read.
        StageError: there are no weights where student.init says.
    """
    inputs = {
        "labeled": labeled.digest(),
        "validation": validation.digest() if validation else "none",
        "labels": labels["digest"],
        "selection": selection["digest"],
    }
    inputs |= exclude_inputs(config.data.exclude) | init_digest(config.student, "student", config.source_dir)
    return Fingerprint(config.stage_fields("student"), inputs)
