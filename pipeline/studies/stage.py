"""stage=ablate: a study of a recipe, one change per row, several seeds, compared on the validation images.

Test images are never opened: a study's results are used to choose a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data import storage
from data.shards.image_reader import check_labeled
from pipeline.core.layout import RESULTS_NAME, Layout
from pipeline.core.schema import Config, Section
from pipeline.core.stage import StageError, accept
from pipeline.pages.scaling_plot import FINDINGS_NAME, SCALING
from pipeline.studies.efficientnet_rs import EFFICIENTNET_RS
from pipeline.studies.noisy_student import NOISY_STUDENT, NOISY_STUDENT_RECIPE
from pipeline.studies.resnet_rs import RESNET_RS, TEACHER_RECIPE, WEIGHT_DECAY
from pipeline.studies.rows import Study, row_configs, rows_for, seeds_of, trials_of
from pipeline.studies.scaling import cells_of, flops_of, scaling_study
from pipeline.studies.scaling_fit import Finding
from pipeline.studies.scaling_table import (
    CELLS_NAME,
    SCALING_PLOT_NAME,
    cell_results,
    describe_findings,
    write_scaling,
)
from pipeline.studies.table import PLOT_NAME, RowResult, describe, row_results, write_results
from pipeline.studies.trainings import open_splits
from pipeline.trials.outlook import describe_remaining
from pipeline.trials.trial import Experiment, Trial, refuse_others, run_trials
from pipeline.upstream.labeled_splits import classes_of, open_labeled

STUDIES = {study.name: study for study in (RESNET_RS, WEIGHT_DECAY, NOISY_STUDENT, EFFICIENTNET_RS)}
_EXPERIMENTS = {NOISY_STUDENT.name: NOISY_STUDENT_RECIPE}  # the other studies train only the teacher


def ablate(config: Config, layout: Layout, force: bool = False) -> None:
    """Run or continue the study `ablate.study`, print its table and write its files; with `force`, first move earlier results aside.

    Raises as `open_study`, and TrainingError when a loss is not finite.
    """
    study, trials = open_study(config, layout, force)
    accept()
    folder = layout.study(study.name)
    run_trials(f"study {study.name}", trials, experiment_of(study), force)
    results = row_results(rows_for(study, config), trials)
    write_results(folder, study, seeds_of(config), results)
    found = _write_scaling(folder, study, config, layout, results) if study.name == SCALING else []
    images = results[0].details[0]["images"]
    print(
        f"study {study.name}: {images:,} validation images, {config.ablate.seeds} seeds\n\n{describe(study, results)}\n"
    )
    names = [PLOT_NAME, *((CELLS_NAME, FINDINGS_NAME, SCALING_PLOT_NAME) if found else ())]
    if found:
        print(f"{describe_findings(found)}\n")
    print(f"written: {storage.join(folder, RESULTS_NAME)}, {', '.join(names)}")


def study_of(config: Config) -> Study:
    """The study `ablate.study`. Raises UsageError: a grid that there cannot be."""
    return scaling_study(config) if config.ablate.study == SCALING else STUDIES[config.ablate.study]


def experiment_of(study: Study) -> Experiment:
    """Return what to run for each row of a study."""
    return _EXPERIMENTS.get(study.name, TEACHER_RECIPE)


def open_study(config: Config, layout: Layout, force: bool = False) -> tuple[Study, list[Trial]]:
    """Return the study `ablate.study` and its trials; write nothing.

    Args:
        force: accept earlier results of another configuration.

    Raises:
        StageRefusedError: there are results of another configuration.
        StageError: there are no labeled or no validation images, or training uses several processes.
        ModelError: a row's network cannot be built.
        UsageError: a row changes nothing in this configuration.
        DataError: labeled shards are damaged or have no labels.
    """
    _check_data(config, layout)
    study = study_of(config)
    trials = trials_of(study, config, layout.study(study.name), experiment_of(study))
    if study.name == SCALING:
        num_classes = _num_classes(config, layout)
        work = {cell.name: flops_of(cell, config, num_classes) * cell.epochs for cell in cells_of(config)}
        trials.sort(key=lambda trial: -work[trial.row])  # the longest first, so that none is left alone at the end
    if not force:
        refuse_others(trials)
    return study, trials


def _check_data(config: Config, layout: Layout) -> None:
    """Check what every row needs, before anything starts. Raises StageError, DataError."""
    labeled, validation = open_labeled(config, layout)
    if labeled is None or validation is None:
        raise StageError("stage=ablate trains on data.labeled and compares on data.validation; set both")
    for role, section in (("teacher", config.teacher), ("student", config.student)):
        if section.workers > 1:
            raise StageError(
                f"{role}.workers={section.workers}: stage=ablate runs several trainings at once, each in one process; set it to 1"
            )
    num_classes, _ = classes_of(config, labeled)
    for split in (labeled, validation):
        check_labeled(split, num_classes)


def _write_scaling(
    folder: str, study: Study, config: Config, layout: Layout, results: Sequence[RowResult]
) -> list[Finding]:
    labeled, _ = open_splits(config)
    num_classes = _num_classes(config, layout)
    facts = {"images": labeled.num_samples, "batch_size": config.teacher.batch_size, "num_classes": num_classes}
    return write_scaling(folder, cell_results(config, results, num_classes), study, facts)


def _num_classes(config: Config, layout: Layout) -> int:
    labeled, _ = open_labeled(config, layout)
    assert labeled is not None, "_check_data has required it"
    return classes_of(config, labeled)[0]


def plan_study(config: Config, layout: Layout) -> None:
    """Print every row with its changes and finished trainings, and the expected time of the others. Raises as `open_study`."""
    study, trials = open_study(config, layout)
    configs = row_configs(study, config)
    for row in rows_for(study, config):
        done = sum(trial.result() is not None for trial in trials if trial.row == row.name)
        changes = ", ".join(f"{field}={_value(configs[row.name], field)}" for field in row.changes)
        print(f"{row.name:28} {done} of {config.ablate.seeds} done   {changes}".rstrip())
    if skipped := [row.name for row in study.rows if row.name not in configs]:
        print(f"left out, as the configuration is like that already: {', '.join(skipped)}")
    print(f"study {study.name}: {describe_remaining(trials, experiment_of(study), 'trainings')}")


def _value(config: Config, field: str) -> Any:
    value: Any = config
    for part in field.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return "(as the student's)" if isinstance(value, Section) else value
