"""Run a study's rows × seeds as resumable Ray tasks: each has a folder, whose done-record is the result; finished ones are reused.

rows (plain data) ──► trials ──► how long it will take ──► Ray tasks ──► one done.json each ──► table
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from tqdm import tqdm

from data import storage
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, done_record, inspect_stage, open_stage
from pipeline.core.timing import read_timing
from pipeline.studies.rows import Study, row_configs, rows_for, seeds_of
from pipeline.studies.tasks import in_tasks, max_concurrent, ray_nodes, resources_of

STAGE = "ablate"


@dataclass(frozen=True)
class Experiment:
    """What to run for one row and seed. The functions are picklable (module level), for Ray's workers.

    Attributes:
        fingerprint: everything the result depends on.
        run: (configuration, folder, sources) → result: make or continue it; `top1` (a fraction) and further JSON values.
            sources: folders it builds on: of the row it needs, then of the row that one needs, and so on.
        expected_seconds: (configuration, sources) → how long `run` takes, measured on the calling machine; works before the
            sources exist.
        scratch: paths in the folder that are removed after the commit.
    """

    fingerprint: Callable[[Config], Fingerprint]
    run: Callable[[Config, str, tuple[str, ...]], Mapping[str, Any]]
    expected_seconds: Callable[[Config, tuple[str, ...]], float]
    scratch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One row with one seed."""

    row: str
    seed: int
    config: Config
    folder: str
    fingerprint: Fingerprint
    sources: tuple[str, ...] = ()  # folders it builds on, the nearest first

    def result(self) -> Mapping[str, Any] | None:
        """Return the experiment's result, or None before it is done."""
        record = done_record(self.folder)
        return record["summary"] if record else None


def trials_of(study: Study, config: Config, folder: str, experiment: Experiment) -> list[Trial]:
    """Return all rows with the first seed, then with the next: an interrupted study has complete seeds.

    Raises UsageError as `row_configs`.
    """
    trials = []
    rows, configs = rows_for(study, config), row_configs(study, config)
    for seed in seeds_of(config):
        sources: dict[str, tuple[str, ...]] = {}
        for row in rows:
            seeded = configs[row.name].model_copy(update={"seed": seed})
            trial_folder = storage.join(folder, _slug(row.name), f"seed-{seed}")
            below = sources[row.needs] if row.needs else ()
            sources[row.name] = (trial_folder, *below)
            trials.append(Trial(row.name, seed, seeded, trial_folder, experiment.fingerprint(seeded), below))
    return trials


def _slug(row: str) -> str:
    return re.sub(r"\W+", "_", row).strip("_").lower()


def refuse_others(trials: Iterable[Trial]) -> None:
    """Raise StageRefusedError, naming the fields, if a folder has a result of another configuration."""
    for trial in trials:
        inspect_stage(trial.folder, STAGE, trial.fingerprint)


def run_trials(study: Study, trials: Sequence[Trial], experiment: Experiment, force: bool = False) -> None:
    """Run the missing trials, as many at once as fit; first print how long they will take.

    Args:
        force: move earlier results aside.

    Raises:
        StageRefusedError: a folder has a result of another configuration, without `force`.
        Whatever the experiment raises.
    """
    if force:
        for trial in trials:
            open_stage(trial.folder, STAGE, trial.fingerprint, force)
    refuse_others(trials)
    todo = [trial for trial in trials if trial.result() is None]
    if not todo:
        return
    start_ray(todo[0].config.ray_address)
    resources = resources_of(todo[0].config, ray_nodes())
    seconds = _expected_seconds(trials, todo, experiment, resources)
    at_once = min(len(todo), max_concurrent(resources))
    total = sum(seconds[trial.row] for trial in todo)
    already = f"{len(trials)} trainings, {len(trials) - len(todo)} of them done"
    duration = tqdm.format_interval(total / at_once)
    print(f"study {study.name}: {already}; {at_once} at once take about {duration}", flush=True)
    indexes = {trial.folder: index for index, trial in enumerate(todo)}
    needs = [indexes.get(trial.sources[0]) if trial.sources else None for trial in todo]
    with _bar(study, total) as bar:
        ended = in_tasks(lambda trial: _run_trial(trial, experiment), todo, resources, bar.refresh, needs)
        for number, (trial, top1) in enumerate(ended, start=1):
            bar.set_postfix_str(f"{number} of {len(todo)}; {trial.row}, seed {trial.seed}: {top1:.2%}", refresh=False)
            bar.update(min(seconds[trial.row], total - bar.n))  # capped: rounding can exceed the total


def _run_trial(trial: Trial, experiment: Experiment) -> float:
    """Run a trial in a Ray task; return its top-1."""
    stage: Stage = open_stage(trial.folder, STAGE, trial.fingerprint)
    if not stage.is_done:
        stage.commit([], experiment.run(trial.config, trial.folder, trial.sources))
    for name in experiment.scratch:
        storage.remove(storage.join(trial.folder, name))
    result = trial.result()
    assert result is not None, "committed just now"
    return float(result["top1"])


def _expected_seconds(
    trials: Iterable[Trial], todo: Iterable[Trial], experiment: Experiment, resources: Mapping[str, float]
) -> dict[str, float]:
    """Return seconds per training by row: the mean of finished ones, else timed in a few steps, under the same concurrency."""
    taken = seconds_taken(trials)
    unknown = {trial.row: trial for trial in todo if trial.row not in taken}

    def measure(row: str) -> float:
        return experiment.expected_seconds(unknown[row].config, unknown[row].sources)

    return taken | dict(in_tasks(measure, list(unknown), resources))


def seconds_taken(trials: Iterable[Trial]) -> dict[str, float]:
    """Return the mean seconds of finished trainings, by row."""
    taken: dict[str, list[float]] = {}
    for trial in trials:
        if trial.result() is not None:
            taken.setdefault(trial.row, []).append(read_timing(trial.folder).seconds)
    return {row: mean(seconds) for row, seconds in taken.items()}


def _bar(study: Study, seconds: float) -> tqdm[Any]:
    """Return a progress bar in seconds of expected work: rows differ in length; the remaining time follows the real speed."""
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    return tqdm(total=seconds, desc=study.name, smoothing=0, bar_format=layout)
