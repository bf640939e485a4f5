"""stage=student: a noised, usually larger model on labeled and pseudo-labeled images together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.labels.label_files import copies_digests, read_labels_manifest
from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, StudentConfig
from pipeline.core.stage import Fingerprint, StageError, open_stage, require_done
from pipeline.inference.publish import WEIGHTS_FOLDER, publish, read_info
from pipeline.inputs.streams import StreamSpec, labeled_stream
from pipeline.models.device import require_device
from pipeline.models.registry import begins_as, build_model, count_parameters, on_meta
from pipeline.training.launch import run_training
from pipeline.training.loop import TrainJob, load_trained
from pipeline.upstream.stage_inputs import (
    explain_inputs,
    require_labeled_corpus,
    require_labels,
    require_same_classes,
    require_selection,
)
from student.fix_resolution import FOLDER, fix_resolution_job

logger = logging.getLogger(__name__)


def train_student(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; returns its done-record.

    Raises:
        StageError: the stage refuses, an earlier one is not done or not of the ones before it, or there are no labeled images.
        DataError: labeled shards that are not right.
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
        require_device(config.resolved_device())  # before the training: it is needed after it, to calibrate
        require_same_classes(class_names, "the teacher", labeled.class_names, "data.labeled")
        for split in (labeled, validation):
            if split is not None:
                check_labeled(split, num_classes)
        streams = _streams(config, layout, labeled, selection_folder)
        prepared.append(TrainJob(
            "student", layout.student, config.student, streams, num_classes, streams[0].num_images, config.seed, config.threads,
            config.resolved_device(), validation, _initial_weights(config, layout),
        ))  # fmt: skip

    stage = open_stage(layout.student, "student", expected, force, explain_inputs(layout), check)
    if stage.is_done:
        return require_done(layout.student, "student")
    _warn_of_smaller_student(config, layout, num_classes)
    (job,) = prepared
    jobs = [job] if (fixing := fix_resolution_job(job, config.student)) is None else [job, fixing]
    for part in jobs:
        run_training(part, config.ray_address)
    last = jobs[-1]
    state, _ = load_trained(last.folder, last.total_steps)
    metrics = ("metrics.jsonl", f"{FOLDER}/metrics.jsonl")[: len(jobs)]
    publish(
        stage, last.config, config, state, tuple(class_names) if class_names else None, num_classes, layout.generation,
        validation, metrics, {"steps": sum(part.total_steps for part in jobs)},
    )  # fmt: skip
    return require_done(layout.student, "student")


def require_labeled(config: Config) -> None:
    """Raises StageError without labeled shards."""
    if not config.data.labeled:
        raise StageError("data.labeled is empty; the student trains on labeled and pseudo-labeled images together")


def fingerprint(
    config: Config, labeled: Split, validation: Split | None, labels: Mapping[str, Any], selection: Mapping[str, Any]
) -> Fingerprint:
    """What the student depends on: its fields, the labeled images, excluded keys, the labels and the selection (their done-records).

    Raises DataError when data.exclude cannot be read.
    """
    inputs = {
        "labeled": labeled.digest(),
        "validation": validation.digest() if validation else "none",
        "labels": labels["digest"],
        "selection": selection["digest"],
    }
    return Fingerprint(config.stage_fields("student"), inputs | exclude_inputs(config.data.exclude))


def _streams(config: Config, layout: Layout, labeled: Split, selection_folder: str) -> tuple[StreamSpec, ...]:
    """Both streams, with their exact share of every batch."""
    student = config.student
    labeled_per_step = student.batch_size // (1 + student.unlabeled_ratio)
    streams: tuple[StreamSpec, ...] = (labeled_stream(labeled, labeled_per_step, read_keys(config.data.exclude)),)
    if student.unlabeled_ratio == 0:
        return streams
    corpus = open_split(config.data.unlabeled, layout.indexes)
    require_labeled_corpus(corpus, require_done(layout.labels, "label"))
    per_step = student.batch_size - labeled_per_step
    return (*streams, pseudo_labeled_stream(config, layout, corpus, selection_folder, per_step))


def pseudo_labeled_stream(
    config: Config, layout: Layout, corpus: Split, selection_folder: str, images_per_step: int
) -> StreamSpec:
    """The stream of the selected pseudo-labels of `corpus`, with the digests of what was committed."""
    entries, copies = read_labels_manifest(layout.labels), copies_digests(require_done(selection_folder, "select"))
    names = [shard.name for shard in corpus.shards]
    return StreamSpec(
        name="pseudo_labeled",
        shard_urls=tuple(shard.url for shard in corpus.shards),
        table_urls=tuple(storage.join(layout.labels, f"{name}.parquet") for name in names),
        num_rows=tuple(entries[name].rows for name in names),
        images_per_step=images_per_step,
        copies_urls=tuple(storage.join(selection_folder, f"{name}.parquet") for name in names),
        targets=config.student.pseudo_labels,
        temperature=config.student.pseudo_label_temperature,
        table_digests=tuple(entries[name].sha256 for name in names),
        copies_digests=tuple(copies[name] for name in names),
    )


def _initial_weights(config: Config, layout: Layout) -> str | None:
    """Where the student's training begins; None: from scratch. Raises StageError when it cannot begin as its teacher."""
    if not config.student.from_teacher:
        return None
    if not _has_teacher(layout):
        raise StageError(
            f"student.from_teacher=true: {layout.teacher} has no weights; bring them, or give student.from_teacher=false"
        )
    info = read_info(layout.teacher)
    require_beginning(config.student, info.model, info.model_args)
    return storage.join(layout.teacher, WEIGHTS_FOLDER)


def _has_teacher(layout: Layout) -> bool:
    """False where labels have traveled alone."""
    return storage.exists(storage.join(layout.teacher, WEIGHTS_FOLDER))


def require_beginning(student: StudentConfig, teacher: str, teacher_args: Mapping[str, Any]) -> None:
    """Raises StageError when the student is to begin as a teacher of this model, and cannot."""
    if not student.from_teacher or (teacher, teacher_args) == (student.model, student.model_args):
        return
    models = (teacher, teacher_args), (student.model, student.model_args)
    if not begins_as(*(on_meta(partial(build_model, name, 2, args)) for name, args in models)):
        raise StageError(
            f"student.from_teacher=true: the teacher is {teacher} with model_args {dict(teacher_args)}, "
            f"the student {student.model} with {student.model_args}; give the student the same student.model and "
            "student.model_args, or a ResNet-RS with more blocks, otherwise the same, or student.from_teacher=false"
        )


def _warn_of_smaller_student(config: Config, layout: Layout, num_classes: int) -> None:
    if not _has_teacher(layout):
        return
    teacher, student = read_info(layout.teacher), config.student
    sizes = [
        count_parameters(build_model(name, num_classes, args, 0.0, 0.0))
        for name, args in ((teacher.model, teacher.model_args), (student.model, student.model_args))
    ]
    if sizes[1] < sizes[0]:
        logger.warning(
            "the student has %.1f M parameters, its teacher %.1f M; an equal or larger one learns more",
            sizes[1] / 1e6,
            sizes[0] / 1e6,
        )
