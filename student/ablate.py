"""stage=ablate: a study of the teacher's recipe, trained on the labeled images alone and compared on the validation images.

Test images are never opened: what a study finds is there to choose by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data import storage
from data.reader import check_labeled
from pipeline.fields import Config
from pipeline.labeled import classes_of, open_labeled
from pipeline.layout import Layout
from pipeline.stage import StageError
from pipeline.study.rows import Study, row_configs, seeds_of
from pipeline.study.table import PLOT_NAME, RESULTS_NAME, describe, row_results, write_results
from pipeline.study.trials import Trial, refuse_others, run_trials, trials_of
from student.recipe_trial import TEACHER_RECIPE
from student.studies import RESNET_RS, WEIGHT_DECAY

STUDIES = {study.name: study for study in (RESNET_RS, WEIGHT_DECAY)}


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
    run_trials(study, trials, TEACHER_RECIPE, force)
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
    trials = trials_of(study, config, layout.study(study.name), TEACHER_RECIPE)
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
