"""One row of Noisy Student's study: the pipeline's own stages in a folder of the row's, beginning with what other rows have made.

The row without sources makes the teacher, its labels and a selection. A row above it makes a selection and a student, and labels
when its own are to differ; a row of a later generation labels with the student before it.
"""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.shards.split import open_split
from data.storage.redact import redacted
from pipeline.core.layout import Branch, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, StageError, require_done
from pipeline.inputs.streams import labeled_stream
from pipeline.models.registry import build_model, on_meta
from pipeline.studies.recipe_trial import training_seconds
from pipeline.studies.tasks import GPU_SHARE
from pipeline.studies.trials import Experiment
from pipeline.training.job import TrainJob
from pipeline.upstream.labeled_splits import classes_of, open_labeled
from student.train import train_student
from teacher.labeling.stage import fingerprint as label_fingerprint
from teacher.labeling.stage import label
from teacher.selection.stage import select
from teacher.train import train_teacher

_MOST_GENERATIONS = 3
_PARTS = ("teacher", "label", "select", "student")


def _fingerprint(config: Config) -> Fingerprint:
    """Of all stages; the models of a row are built here, without memory, so that one that cannot be is refused at once."""
    home = Layout(config.run_dir)
    labeled, validation = open_labeled(config, home)
    if labeled is None or validation is None or not config.data.unlabeled:
        raise StageError(
            "ablate.study=noisy_student needs data.labeled, data.validation (on which it compares) and data.unlabeled"
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
    chosen = {
        "generations": config.generations,
        "data.held_out_hashes": [redacted(url) for url in config.data.held_out_hashes],
    }
    return Fingerprint(fields | chosen, inputs)


def _run(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """Top-1 on the validation images of the row's last model: EMA weights, no noise. A bad teacher is no reason to stop a study: its
    figure says so."""
    config = _in_a_task(config)
    generation = config.most_generations()
    if not sources:
        layout = Branch(folder, home=config.run_dir)
        teacher = train_teacher(config, layout)
        label(config, layout, accept_chance=True)
        select(config, layout)
        return _result(teacher)
    own = {(generation, "selections"), (generation, "student")} | _own_labels(config, folder, sources)
    layout = Branch(folder, generation, config.run_dir, sources, frozenset(own))
    label(config, layout, accept_chance=True)
    select(config, layout)
    return _result(train_student(config, layout))


def _own_labels(config: Config, folder: str, sources: tuple[str, ...]) -> set[tuple[int, str]]:
    """What a row makes itself because nobody before it has these labels."""
    generation = config.most_generations()
    there = Branch(folder, generation, config.run_dir, sources)
    teacher = require_done(there.teacher, "teacher" if generation == 1 else "student")
    expected = label_fingerprint(config, teacher["digest"])
    if there.labels != Layout(folder, generation).labels and (
        require_done(there.labels, "label")["fingerprint"] == expected.as_json()
    ):
        return set()
    return {(generation, "labels"), (generation, "near_duplicates")}


def _in_a_task(config: Config) -> Config:
    """The task has reserved the CPUs that its labeling actor works with, and left a part of the GPU: it need not wait for room."""
    section = config.label.model_copy(
        update={"workers": 1, "cpus_per_worker": 0.0, "gpus_per_worker": round(1 - GPU_SHARE, 3)}
    )
    return config.model_copy(update={"label": section, "ray_address": None})


def _result(record: dict[str, Any]) -> dict[str, Any]:
    summary = record["summary"]
    return {"top1": summary["validation_top1"], "steps": summary.get("steps"), "images": summary["validation_images"]}


def _expected_seconds(config: Config, sources: tuple[str, ...]) -> float:
    """Of training, timed in a few steps on labeled images (pseudo-labeled ones cost the same), and of labeling."""
    with tempfile.TemporaryDirectory() as folder:
        if not sources:
            seconds, image_s = _teaching_seconds(config, storage.join(folder, "teacher"))
            return seconds + _labeling_seconds(config, image_s)
        seconds, image_s = training_seconds(_student_job(config, storage.join(folder, "student")))
        if config.most_generations() > 1:
            return seconds + _labeling_seconds(config, image_s)
        if config.label.augment is not None:
            seconds += _labeling_seconds(config, _teaching_seconds(config, storage.join(folder, "teacher"))[1])
        return seconds


def _teaching_seconds(config: Config, folder: str) -> tuple[float, float]:
    """Of the teacher's training, and of one image's forward pass."""
    if config.teacher.weights is None:
        return training_seconds(_job(config, "teacher", folder, config.teacher.batch_size))
    return 0.0, training_seconds(_job(config, "teacher", folder, config.teacher.batch_size))[1]


def _labeling_seconds(config: Config, image_s: float) -> float:
    home = Layout(config.run_dir)
    return open_split(config.data.unlabeled, home.indexes).num_samples * config.label.views * image_s


def _student_job(config: Config, folder: str) -> TrainJob:
    return _job(config, "student", folder, config.student.batch_size // (1 + config.student.unlabeled_ratio))


def _job(config: Config, role: str, folder: str, labeled_per_step: int) -> TrainJob:
    """A training of that many steps, but on labeled images alone."""
    labeled, validation = open_labeled(config, Layout(config.run_dir))
    assert labeled is not None, "_fingerprint has checked it"
    num_classes, _ = classes_of(config, labeled)
    section = config.teacher if role == "teacher" else config.student
    stream = labeled_stream(labeled, section.batch_size, read_keys(config.data.exclude))
    num_labeled = stream.num_images * section.batch_size // labeled_per_step  # of which an epoch's steps follow
    return TrainJob(
        name=role,
        folder=folder,
        config=section,
        streams=(stream,),
        num_classes=num_classes,
        num_labeled=num_labeled,
        seed=config.seed,
        threads=config.threads,
        device=config.resolved_device(),
        validation=validation,
    )


NOISY_STUDENT_RECIPE = Experiment(
    _fingerprint,
    _run,
    _expected_seconds,
    scratch=tuple(
        f"gen-{generation}/{role}/checkpoints"
        for generation in range(1, _MOST_GENERATIONS + 1)
        for role in ("teacher", "student")
    ),
)
