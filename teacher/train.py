"""stage=teacher: train on the labeled images, or take weights trained elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data.labels.exclusions import exclude_inputs, read_keys
from data.shards.image_reader import check_labeled
from data.shards.split import Split
from data.storage.redact import redacted
from pipeline.core.devices import require_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, TeacherConfig, TrainConfig
from pipeline.core.stage import Fingerprint, StageError, digest_of, open_stage, require_done
from pipeline.inference.commit_weights import TrainedModel, commit_weights
from pipeline.inputs.streams import labeled_stream
from pipeline.models.class_order import class_order, reorder_classes
from pipeline.models.external_weights import load_external, other_preprocessing, weights_digest
from pipeline.models.initial_weights import init_digest, initial_weights
from pipeline.training.job import job_from_config
from pipeline.training.launch import run_training
from pipeline.training.metrics_log import METRICS_NAME
from pipeline.training.state import load_trained
from pipeline.upstream.labeled_splits import classes_of, open_labeled


def train_teacher(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; return its done-record. From the second generation on, that of the student before.

    Raises:
        StageError: the stage refuses, or an input is missing.
        DataError: the labeled shards have no usable labels, or are damaged.
        ModelError: teacher.weights do not fit the model or the classes.
    """
    if layout.generation > 1:
        return require_done(layout.teacher, "student")
    labeled, validation = open_labeled(config, layout)
    external: list[dict[str, Tensor] | None] = []
    stage = open_stage(
        layout.teacher,
        "teacher",
        fingerprint(config, labeled, validation),
        force,
        check=lambda: external.append(_check(config, labeled, validation)),
    )
    if stage.is_done:
        return require_done(layout.teacher, "teacher")
    num_classes, class_names = classes_of(config, labeled or validation)
    if (weights := external[0]) is not None:
        _note_preprocessing(config.teacher)
        if validation is None:
            print(
                "teacher: without data.validation, nothing checks that classes and preprocessing are those of teacher.weights"
            )
        state = weights
        made: dict[str, Any] = {"summary": {"trained_elsewhere": redacted(str(config.teacher.weights))}}
    else:
        assert labeled is not None, "fingerprint() requires it"
        state, steps = _train(config, layout, labeled, validation)
        begun = {"begun_with": redacted(config.teacher.init)} if config.teacher.init else {}
        made = {"outputs": (METRICS_NAME,), "summary": {"steps": steps} | begun}
    trained = TrainedModel(config.teacher, state, num_classes, class_names, generation=0)
    commit_weights(stage, trained, config, validation, **made)
    return require_done(layout.teacher, "teacher")


def fingerprint(config: Config, labeled: Split | None, validation: Split | None) -> Fingerprint:
    """What the teacher depends on.

    Raises:
        StageError: there are neither labeled images nor weights, or none where teacher.init says.
        ModelError: there are no such weights, or they have other classes.
        UsageError: teacher.class_names cannot be read.
        DataError: data.exclude cannot be read.
    """
    inputs = {"validation": validation.digest() if validation else "none"}
    if config.teacher.weights:
        inputs["weights"] = weights_digest(config.teacher.weights)
        split = labeled or validation
        names = split.class_names if split else None
        if (order := class_order(config.teacher.weights, config.teacher.class_names, names)) is not None:
            inputs["class_names"] = digest_of(order)
    elif labeled is not None:
        inputs |= {"labeled": labeled.digest()} | exclude_inputs(config.data.exclude)
        inputs |= init_digest(config.teacher, "teacher", config.run_dir)
    else:
        raise StageError(
            "data.labeled is empty; give labeled shards, or a teacher trained elsewhere as teacher.weights=FILE"
        )
    return Fingerprint(config.stage_fields("teacher"), inputs)


def _check(config: Config, labeled: Split | None, validation: Split | None) -> dict[str, Tensor] | None:
    """Check device and data before anything is written; return the weights trained elsewhere (None: train).

    Raises:
        UsageError: no GPU where one is asked for.
        DataError, ModelError: see `train_teacher`.
    """
    require_device(config.resolved_device(), config.ray_address)  # calibration needs it after the training
    num_classes, class_names = classes_of(config, labeled or validation)
    if validation is not None:
        check_labeled(validation, num_classes)
    section = config.teacher
    if section.weights is None:
        assert labeled is not None, "fingerprint() requires it"
        check_labeled(labeled, num_classes)
        if (initial := initial_weights(section, "teacher", config.run_dir, class_names)) is not None:
            print(f"{initial.field}={redacted(initial.source)}: {initial.check(section, num_classes)}", flush=True)
        return None
    return _load_external(section, section.weights, num_classes, class_names)


def _load_external(
    section: TeacherConfig, weights: str, num_classes: int, class_names: Sequence[str] | None
) -> dict[str, Tensor]:
    """Weights from a file, with outputs in the order of the data's classes."""
    state = load_external(section.model, section.model_args, num_classes, weights)
    order = class_order(weights, section.class_names, class_names)
    if order is None:
        return state
    print(
        f"teacher: the classes of teacher.weights are in another order than the data's; {num_classes} outputs reordered"
    )
    return reorder_classes(section.model, section.model_args, state, order, section.image_size)


def _train(config: Config, layout: Layout, labeled: Split, validation: Split | None) -> tuple[dict[str, Tensor], int]:
    """Train; return EMA weights and the number of steps."""
    num_classes, class_names = classes_of(config, labeled)
    initial = initial_weights(config.teacher, "teacher", config.run_dir, class_names)
    stream = labeled_stream(labeled, config.teacher.batch_size, read_keys(config.data.exclude))
    job = job_from_config(config, "teacher", layout.teacher, (stream,), num_classes, validation, initial)
    run_training(job, config.ray_address)
    return load_trained(job)[0], job.total_steps


def _note_preprocessing(section: TrainConfig) -> None:
    """Print where the preprocessing differs from timm's for this model. Wrong preprocessing raises no error, but labels badly."""
    given = {"mean": section.mean, "std": section.std}
    for field, recorded in other_preprocessing(section.model, section.model_args, given).items():
        print(
            f"teacher: teacher.{field}={given[field]}, but timm's weights of {section.model} have {recorded}: check which yours need"
        )
