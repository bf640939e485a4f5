"""Noisy Student's ablations (arXiv 1911.04252) for `stage=ablate`: teacher, labels and student of the run's recipe.

The paper's figures are not available to us; `finding` is its result in words. A trial runs the pipeline's stages in a folder
of its own, on top of what other rows have made: the row without sources makes teacher, labels and a selection, which serve all
rows of its seed; a row above it makes a selection and a student, and labels if its own differ; a row of a later generation
labels with the student before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from data.labels.exclusions import exclude_inputs
from data.shards.split import open_split
from data.storage.redact import redacted
from pipeline.core.layout import Branch, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, require_done
from pipeline.models.expected_time import Workload
from pipeline.models.initial_weights import init_digest
from pipeline.models.registry import build_model, on_meta
from pipeline.studies.rows import Row, Study, no_input_noise
from pipeline.studies.trainings import labeled_job, open_splits
from pipeline.training.job import TrainJob
from pipeline.trials.tasks import GPU_SHARE
from pipeline.trials.trial import Experiment
from pipeline.trials.workloads import forward_workload, training_workloads
from pipeline.upstream.labeled_splits import classes_of, open_labeled
from student.train import train_student
from teacher.labeling.label_calibration import calibration_input
from teacher.labeling.stage import fingerprint as label_fingerprint
from teacher.labeling.stage import label
from teacher.selection.stage import select
from teacher.train import train_teacher

Fields = Mapping[str, Any]
TEACHER, RECIPE, EQUAL = "teacher", "recipe", "student of equal size"
_PER_STEP = ("epochs", "warmup_epochs", "eval_every_epochs")
_MAX_GENERATIONS = 3  # of the rows below
_PARTS = ("teacher", "label", "select", "student")

_NO_MODEL_NOISE = {"student.dropout": 0.0, "student.stochastic_depth": 0.0}


def _ratio(ratio: int) -> dict[str, Any]:
    """Change the ratio at an equal number of steps: epochs count labeled images, so rescale them."""

    def rescaled(name: str) -> Callable[[Fields], float]:
        return lambda run: float(run["student"][name] * (1 + run["student"]["unlabeled_ratio"]) / (1 + ratio))

    return {"student.unlabeled_ratio": ratio} | {f"student.{name}": rescaled(name) for name in _PER_STEP}


def _of_teacher(width: float) -> dict[str, Any]:
    """Give the student the teacher's network, with `width` times as many channels."""

    def model_args(run: Fields) -> dict[str, Any]:
        args = copy.deepcopy(dict(run["teacher"]["model_args"]))
        return args if width == 1 else args | {"width": args.get("width", 1.0) * width}

    return {"student.model": lambda run: run["teacher"]["model"], "student.model_args": model_args}


def _row(name: str, changes: Mapping[str, Any], finding: str, of: str = RECIPE) -> Row:
    return Row(name, changes, of=of, needs=TEACHER, finding=finding)


NOISY_STUDENT = Study(
    name="noisy_student",
    source="in words, arXiv 1911.04252 (ImageNet); no figures at hand",
    base={
        "generations": 1,
        "label.augment": None,
        "student.init": None,
        "student.init_head_lr_scale": 1.0,
        "student.freeze_backbone_epochs": 0.0,
    },
    rows=(
        Row(TEACHER, {}),
        _row(RECIPE, {}, "better", of=TEACHER),
        _row("no input noise", no_input_noise("student"), "worse"),
        _row("no model noise", _NO_MODEL_NOISE, "worse"),
        _row("noised teacher", {"label.augment": lambda run: run["student"]["augment"]}, "worse"),
        _row("soft labels", {"student.pseudo_labels": "soft"}, "equal, better out of domain"),
        _row("hard labels", {"student.pseudo_labels": "hard"}, "equal, worse out of domain"),
        _row("no balancing", {"select.per_class": None}, "worse for small models"),
        _row("ratio 1", _ratio(1), ""),
        _row("ratio 3", _ratio(3), ""),
        _row("ratio 7", _ratio(7), ""),
        _row("smaller student", _of_teacher(0.5), ""),
        _row(EQUAL, _of_teacher(1), ""),
        _row("larger student", _of_teacher(1.5), "better"),
        _row("from teacher's weights", {"student.init": "teacher"}, "worse", of=EQUAL),
        Row("2 generations", {"generations": 2}, of=RECIPE, needs=RECIPE, finding="better"),
        Row("3 generations", {"generations": 3}, of="2 generations", needs="2 generations", finding="better"),
    ),
    skip_unchanged=True,
)


def _fingerprint(config: Config) -> Fingerprint:
    """Return the fields and inputs of all stages; build the row's models on the meta device, so that an invalid one fails at once."""
    home = Layout(config.run_dir)
    labeled, validation = open_labeled(config, home)
    if labeled is None or validation is None or not config.data.unlabeled:
        raise StageError(
            "ablate.study=noisy_student needs data.labeled, data.validation (to compare on) and data.unlabeled; set all three"
        )
    num_classes, _ = classes_of(config, labeled)
    for name, section in (("teacher", config.teacher), ("student", config.student)):
        config.require_trainable(name)
        rates = section.dropout, section.stochastic_depth
        on_meta(partial(build_model, section.model, num_classes, section.model_args, *rates))
    fields = {field: value for part in _PARTS for field, value in config.stage_fields(part).items()}
    splits = {
        "labeled": labeled,
        "validation": validation,
        "unlabeled": open_split(config.data.unlabeled, home.indexes),
    }
    inputs = {name: split.digest() for name, split in splits.items()} | exclude_inputs(config.data.exclude)
    inputs |= init_digest(config.teacher, "teacher", config.run_dir)
    more_fields = {
        "generations": config.generations,
        "data.held_out_hashes": [redacted(url) for url in config.data.held_out_hashes],
    }
    return Fingerprint(fields | more_fields, inputs)


def _run(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """Run the stages; return the last model's top-1 on the validation images (EMA weights, no noise).

    A teacher at chance level does not stop the study: its figure shows it.
    """
    config = _within_task(config)
    generation = config.most_generations()
    if not sources:
        layout = Branch(folder, home=config.run_dir)
        teacher = train_teacher(config, layout)
        label(config, layout, accept_chance=True)
        select(config, layout)
        return _result(teacher)
    made = {(generation, "selections"), (generation, "student")} | _labels_to_make(config, folder, sources)
    layout = Branch(folder, generation, config.run_dir, sources, frozenset(made))
    label(config, layout, accept_chance=True)
    select(config, layout)
    return _result(train_student(config, layout))


def _labels_to_make(config: Config, folder: str, sources: tuple[str, ...]) -> set[tuple[int, str]]:
    """Return (generation, folder) of the labels that the row must make; empty if a source has the same ones."""
    generation = config.most_generations()
    below = Branch(folder, generation, config.run_dir, sources)
    teacher = require_done(below.teacher, below.teacher_stage)
    expected = label_fingerprint(config, teacher["digest"], calibration_input(config, below))
    if below.labels != Layout(folder, generation).labels and (
        require_done(below.labels, "label")["fingerprint"] == expected.as_json()
    ):
        return set()
    return {(generation, "labels"), (generation, "near_duplicates")}


def _within_task(config: Config) -> Config:
    """Return the configuration of a labeling actor that uses the CPUs and the GPU share this task has reserved, and so never waits."""
    section = config.label.model_copy(
        update={"workers": 1, "cpus_per_worker": 0.0, "gpus_per_worker": round(1 - GPU_SHARE, 3)}
    )
    return config.model_copy(update={"label": section, "ray_address": None})


def _result(record: dict[str, Any]) -> dict[str, Any]:
    summary = record["summary"]
    return {"top1": summary["validation_top1"], "steps": summary.get("steps"), "images": summary["validation_images"]}


def _workloads(config: Config, sources: tuple[str, ...]) -> list[Workload]:
    """Trainings, with as many labeled images as the row's batches have in all, and labeling, where the row makes its own labels."""
    labeled, _ = open_splits(config)
    teacher = labeled_job(config, "teacher", "")
    if not sources:
        trained = [] if config.teacher.weights else training_workloads(teacher, labeled)
        return [*trained, _labeling(config, teacher)]
    student = labeled_job(config, "student", "", config.student.labeled_per_step)
    works = training_workloads(student, labeled)
    if config.most_generations() > 1:
        return [*works, _labeling(config, student)]
    return [*works, _labeling(config, teacher)] if config.label.augment is not None else works


def _labeling(config: Config, job: TrainJob) -> Workload:
    unlabeled = open_split(config.data.unlabeled, Layout(config.run_dir).indexes)
    return forward_workload(job, unlabeled.num_samples * config.label.num_views, config.label.batch_size)


NOISY_STUDENT_RECIPE = Experiment(
    _fingerprint,
    _run,
    _workloads,
    scratch=tuple(
        f"gen-{generation}/{role}/checkpoints"
        for generation in range(1, _MAX_GENERATIONS + 1)
        for role in ("teacher", "student")
    ),
)
