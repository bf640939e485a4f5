"""stage=ablate: a study of the teacher's recipe, trained on the labeled images alone and compared on the validation images.

Test images are never opened: what a study finds is there to choose by.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data import storage
from data.exclude import exclude_inputs, read_keys
from data.manifest import Split
from data.reader import check_labeled
from pipeline.fields import Config
from pipeline.labeled import classes_of, open_labeled
from pipeline.layout import Layout
from pipeline.stage import Fingerprint, StageError
from pipeline.study.rows import Study, row_configs, seeds_of
from pipeline.study.table import PLOT_NAME, RESULTS_NAME, describe, row_results, write_results
from pipeline.study.trials import Experiment, Trial, refuse_others, run_trials, trials_of
from pipeline.training.fit import TrainJob, fit, load_trained
from pipeline.training.inputs import labeled_stream
from student.studies import RESNET_RS, WEIGHT_DECAY

STUDIES = {study.name: study for study in (RESNET_RS, WEIGHT_DECAY)}
_FEW_STEPS, _MORE_STEPS = 4, 12  # of which the difference is timed: what comes before the first step cancels out
_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic


def ablate(config: Config, layout: Layout, force: bool = False) -> None:
    """Make or continue the study `ablate.study`, then print its table and write its files.

    Args:
        force: move all its earlier results aside first.

    Raises:
        What `open_study` raises.
        TrainingError: a loss that is not finite.
    """
    study, trials = open_study(config, layout, force)
    folder = layout.study(study.name)
    run_trials(study, trials, EXPERIMENT, force)
    results = row_results(study, trials)
    write_results(folder, study, seeds_of(config), results)
    images = results[0].details[0]["images"]
    print(
        f"study {study.name}: {images:,} validation images, {config.ablate.seeds} seeds\n\n{describe(study, results)}\n"
    )
    print(f"written: {storage.join(folder, RESULTS_NAME)}, {PLOT_NAME}")


def open_study(config: Config, layout: Layout, force: bool = False) -> tuple[Study, list[Trial]]:
    """The study that is asked for and its trials; changes nothing.

    Args:
        force: earlier results of another configuration are no reason to refuse.

    Raises:
        StageRefusedError: results of another configuration are there.
        StageError: there are no labeled or no validation images, or training is to run in several processes.
        UsageError: a row that changes nothing in this configuration.
        DataError: labeled shards that are not right.
    """
    _check_data(config, layout)
    study = STUDIES[config.ablate.study]
    trials = trials_of(study, config, layout.study(study.name), EXPERIMENT)
    if not force:
        refuse_others(trials)
    return study, trials


def _check_data(config: Config, layout: Layout) -> None:
    """Before anything starts: what every row needs. Raises StageError, DataError."""
    labeled, validation = open_labeled(config, layout)
    if labeled is None or validation is None:
        raise StageError("stage=ablate trains on data.labeled and compares on data.validation; give shards for both")
    if config.teacher.workers > 1:
        raise StageError(
            f"teacher.workers={config.teacher.workers}: stage=ablate runs several trainings at once, of one process each; give 1"
        )
    num_classes, _ = classes_of(config, labeled)
    for split in (labeled, validation):
        check_labeled(split, num_classes)


def plan_study(config: Config, layout: Layout) -> None:
    """Print every row with its changes, and how many of its trainings are done. Raises as `open_study`."""
    study, trials = open_study(config, layout)
    for row in study.rows:
        done = sum(trial.result() is not None for trial in trials if trial.row == row.name)
        values = row_configs(study, config)[row.name].fingerprint("")
        changes = ", ".join(f"{field}={_value(values, field)}" for field in row.changes)
        print(f"{row.name:28} {done} of {config.ablate.seeds} done   {changes}".rstrip())


def _value(values: Mapping[str, Any], field: str) -> Any:
    section, _, name = field.rpartition(".")
    return values[field] if field in values else values[section][name]


def _fingerprint(config: Config) -> Fingerprint:
    labeled, validation = _splits(config)
    inputs = {"labeled": labeled.digest(), "validation": validation.digest()}
    return Fingerprint(config.stage_fields("teacher"), inputs | exclude_inputs(config.data.exclude))


def _train(config: Config, folder: str) -> dict[str, Any]:
    """Top-1 of the EMA weights on the validation images."""
    job = _job(config, folder)
    fit(job)
    _, metrics = load_trained(folder, job.total_steps)
    top1 = [line["validation_top1"] for line in metrics if "validation_top1" in line][-1]
    loss = [line["loss"] for line in metrics if "loss" in line][-1]
    assert job.validation is not None, "see _job"
    return {"top1": top1, "loss": loss, "steps": job.total_steps, "images": job.validation.num_samples}


def _expected_seconds(config: Config) -> float:
    """Steps × the time of one, and of the validation images."""
    with tempfile.TemporaryDirectory() as folder:
        job = _job(config, folder)
        start, few = _timed(job, _FEW_STEPS, folder)
        end, more = _timed(job, _MORE_STEPS, folder)
    step_s = max(0.0, end - start) / (more - few)
    assert job.validation is not None, "see _job"
    evaluations = max(1, round(config.teacher.epochs / config.teacher.eval_every_epochs))
    evaluated = evaluations * job.validation.num_samples / config.teacher.batch_size
    return job.total_steps * step_s + evaluated * step_s * _FORWARD_SHARE


def _timed(job: TrainJob, steps: int, folder: str) -> tuple[float, int]:
    """Seconds of a short training that learns next to nothing, and its steps."""
    changes = {"epochs": steps / job.steps_per_epoch, "warmup_epochs": 0.0, "lr": 1e-6}
    section = job.config.model_copy(update=changes)
    short = replace(job, config=section, folder=storage.join(folder, str(steps)), validation=None)
    started = time.monotonic()
    fit(short)
    return time.monotonic() - started, short.total_steps


def _job(config: Config, folder: str) -> TrainJob:
    labeled, validation = _splits(config)
    num_classes, _ = classes_of(config, labeled)
    stream = labeled_stream(labeled, config.teacher.batch_size, read_keys(config.data.exclude))
    return TrainJob(
        "ablate", folder, config.teacher, (stream,), num_classes, stream.num_images, config.seed, config.threads,
        config.resolved_device(), validation,
    )  # fmt: skip


def _splits(config: Config) -> tuple[Split, Split]:
    labeled, validation = open_labeled(config, Layout(config.run_dir))
    assert labeled is not None, "see _check_data"
    assert validation is not None, "see _check_data"
    return labeled, validation


EXPERIMENT = Experiment(_fingerprint, _train, _expected_seconds, scratch=("checkpoints",))
