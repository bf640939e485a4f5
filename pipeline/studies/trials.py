"""Rows × seeds of a study as resumable Ray tasks: one folder each, whose done-record is the result; finished ones are not repeated.

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
from pipeline.studies.tasks import in_tasks, ray_nodes, resources_of, room_for

STAGE = "ablate"


@dataclass(frozen=True)
class Experiment:
    """What is done for one row and seed. Functions at the top of a module: they travel to Ray's workers.

    Attributes:
        fingerprint: what a result is a function of.
        run: makes or continues the result in a folder; returns it: `top1` (a fraction), and further values for JSON. Its last
            argument: the folders that it builds on, the row's own need first, then what that one needed.
        expected_seconds: how long `run` takes, measured where it is called; of what is in those folders, before anything is.
        scratch: what `run` leaves in the folder that is of no use once the result is committed.
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
    sources: tuple[str, ...] = ()  # folders of what it builds on, the nearest first

    def result(self) -> Mapping[str, Any] | None:
        """What the experiment returned, or None before it is done."""
        record = done_record(self.folder)
        return record["summary"] if record else None


def trials_of(study: Study, config: Config, folder: str, experiment: Experiment) -> list[Trial]:
    """All rows with the first seed, then with the next: a study that is stopped has whole seeds.

    Raises:
        UsageError: see `row_configs`.
    """
    trials = []
    rows, configs = rows_for(study, config), row_configs(study, config)
    for seed in seeds_of(config):
        sources: dict[str, tuple[str, ...]] = {}
        for row in rows:
            seeded = configs[row.name].model_copy(update={"seed": seed})
            where = storage.join(folder, _slug(row.name), f"seed-{seed}")
            below = sources[row.needs] if row.needs else ()
            sources[row.name] = (where, *below)
            trials.append(Trial(row.name, seed, seeded, where, experiment.fingerprint(seeded), below))
    return trials


def _slug(row: str) -> str:
    return re.sub(r"\W+", "_", row).strip("_").lower()


def refuse_others(trials: Iterable[Trial]) -> None:
    """Raises StageRefusedError, naming the fields, when a folder holds a result of another configuration."""
    for trial in trials:
        inspect_stage(trial.folder, STAGE, trial.fingerprint)


def run_trials(study: Study, trials: Sequence[Trial], experiment: Experiment, force: bool = False) -> None:
    """Make what is missing, as many at once as Ray has room for; says before how long that will take.

    Raises:
        StageRefusedError: a folder holds a result of another configuration, and `force` does not move it aside.
        What the experiment raises.
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
    at_once = min(len(todo), room_for(resources))
    total = sum(seconds[trial.row] for trial in todo)
    already = f"{len(trials)} trainings, {len(trials) - len(todo)} of them done"
    duration = tqdm.format_interval(total / at_once)
    print(f"study {study.name}: {already}; {at_once} at once take about {duration}", flush=True)
    with _bar(study, total) as bar:
        ended = in_tasks(lambda trial: _run_trial(trial, experiment), todo, resources, bar.refresh, _needs(todo))
        for number, (trial, top1) in enumerate(ended, start=1):
            bar.set_postfix_str(f"{number} of {len(todo)}; {trial.row}, seed {trial.seed}: {top1:.2%}", refresh=False)
            bar.update(min(seconds[trial.row], total - bar.n))  # a sum in another order may be larger by a rounding


def _needs(todo: Sequence[Trial]) -> list[int | None]:
    """For each trial, the place in the list of the one that it builds on, if that is yet to be made."""
    places = {trial.folder: place for place, trial in enumerate(todo)}
    return [places.get(trial.sources[0]) if trial.sources else None for trial in todo]


def _run_trial(trial: Trial, experiment: Experiment) -> float:
    """In a Ray task: the result's top-1."""
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
    """Row → seconds of one training: of those that are done, or measured in a few steps, as many rows at once as will train."""
    taken = seconds_taken(trials)
    unknown = {trial.row: trial for trial in todo if trial.row not in taken}

    def measure(row: str) -> float:
        return experiment.expected_seconds(unknown[row].config, unknown[row].sources)

    return taken | dict(in_tasks(measure, list(unknown), resources))


def seconds_taken(trials: Iterable[Trial]) -> dict[str, float]:
    """Row → mean seconds of its trainings that are done."""
    taken: dict[str, list[float]] = {}
    for trial in trials:
        if trial.result() is not None:
            taken.setdefault(trial.row, []).append(read_timing(trial.folder).seconds)
    return {row: mean(seconds) for row, seconds in taken.items()}


def _bar(study: Study, seconds: float) -> tqdm[Any]:
    """Its unit is a second of expected work: rows differ in length, and the time left follows the machine's real speed."""
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    return tqdm(total=seconds, desc=study.name, smoothing=0, bar_format=layout)
