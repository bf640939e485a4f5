"""Run trials as resumable Ray tasks: each has a folder, whose done-record is the result; finished ones are reused.

trials (a configuration and a seed each) ──► how long they will take ──► Ray tasks ──► one done.json each
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from data import storage
from data.progress_bar import ProgressBar
from pipeline.core.devices import is_elsewhere
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, done_record, inspect_stage, open_stage
from pipeline.core.timing import duration, read_timing
from pipeline.models.expected_time import Workload, gpu_seconds
from pipeline.models.expected_time import expected_seconds as expected_seconds_here
from pipeline.trials.tasks import in_tasks, max_concurrent, ray_nodes, resources_of, training_cpus


def _no_outputs(config: Config) -> Sequence[str]:  # noqa: ARG001 (an `Experiment.outputs`)
    return ()


@dataclass(frozen=True)
class Experiment:
    """What to run for one trial. The functions are picklable (module level), for Ray's workers.

    Attributes:
        fingerprint: everything the result depends on.
        run: (configuration, folder, sources) → result: make or continue it; JSON values, as `top1` (a fraction).
            sources: folders it builds on: of the row it needs, then of the row that one needs, and so on.
        workloads: (configuration, sources) → what the models have to do, for the time that `run` takes; works before the sources
            exist. Nothing for what takes a moment, or for a time that only a finished trial of the row tells.
        scratch: paths in the folder that are removed after the commit.
        outputs: files in the folder that are committed with the result.
        cpus: that Ray reserves for a trial.
    """

    fingerprint: Callable[[Config], Fingerprint]
    run: Callable[[Config, str, tuple[str, ...]], Mapping[str, Any]]
    workloads: Callable[[Config, tuple[str, ...]], list[Workload]]
    scratch: tuple[str, ...] = ()
    outputs: Callable[[Config], Sequence[str]] = _no_outputs
    cpus: Callable[[Config], int] = training_cpus


@dataclass(frozen=True)
class Trial:
    """One row with one seed; `stage` is the name in its done-record and in messages."""

    row: str
    seed: int
    config: Config
    folder: str
    fingerprint: Fingerprint
    sources: tuple[str, ...] = ()  # folders it builds on, the nearest first
    stage: str = "ablate"

    def result(self) -> Mapping[str, Any] | None:
        """Return the experiment's result, or None before it is done."""
        record = done_record(self.folder)
        return record["summary"] if record else None


def refuse_others(trials: Iterable[Trial]) -> None:
    """Raise StageRefusedError, naming the fields, if a folder has a result of another configuration."""
    for trial in trials:
        inspect_stage(trial.folder, trial.stage, trial.fingerprint)


def run_trials(
    title: str, trials: Sequence[Trial], experiment: Experiment, force: bool = False, unit: str = "trainings"
) -> None:
    """Run the missing trials, as many at once as fit; first print how long they will take.

    Args:
        title: of the messages, as `study resnet_rs`.
        force: move earlier results aside.
        unit: what the trials are, in the plural.

    Raises:
        StageRefusedError: a folder has a result of another configuration, without `force`.
        Whatever the experiment raises.
    """
    if force:
        for trial in trials:
            open_stage(trial.folder, trial.stage, trial.fingerprint, force)
    refuse_others(trials)
    todo: list[Trial] = []
    for trial in trials:
        if trial.result() is None:
            todo.append(trial)
        else:
            _remove_scratch(trial, experiment)  # a kill may have come between the commit and this
    if not todo:
        return
    start_ray(todo[0].config.ray_address)
    cpus = max(experiment.cpus(trial.config) for trial in todo)
    resources = resources_of(todo[0].config, ray_nodes(), cpus)
    seconds = expected_seconds(trials, todo, experiment)
    at_once = min(len(todo), max_concurrent(resources))
    total = sum(seconds[trial.row] for trial in todo)
    takes = f" take about {duration(total / at_once)}" if math.isfinite(total) else ""
    already = f"{len(trials)} {unit}, {len(trials) - len(todo)} of them done"
    print(f"{title}: {already}; {at_once} at once{takes}", flush=True)
    indexes = {trial.folder: index for index, trial in enumerate(todo)}
    needs = [indexes.get(trial.sources[0]) if trial.sources else None for trial in todo]
    with _bar(title, total) as bar:
        ended = in_tasks(lambda trial: _run_trial(trial, experiment), todo, resources, bar.refresh, needs)
        for number, (trial, outcome) in enumerate(ended, start=1):
            bar.set_postfix_str(f"{number} of {len(todo)}; {trial.row}, seed {trial.seed}{outcome}", refresh=False)
            bar.update(min(seconds[trial.row], total - bar.n))  # capped: rounding can exceed the total


def _run_trial(trial: Trial, experiment: Experiment) -> str:
    """Run a trial in a Ray task; return `: ` and its top-1, or nothing if it has none."""
    stage: Stage = open_stage(trial.folder, trial.stage, trial.fingerprint)
    if not stage.is_done:
        result = experiment.run(trial.config, trial.folder, trial.sources)
        stage.commit(experiment.outputs(trial.config), result)
    _remove_scratch(trial, experiment)
    committed = trial.result()
    assert committed is not None, "committed just now"
    return f": {committed['top1']:.2%}" if "top1" in committed else ""


def _remove_scratch(trial: Trial, experiment: Experiment) -> None:
    for name in experiment.scratch:
        storage.remove(storage.join(trial.folder, name))


def expected_seconds(trials: Sequence[Trial], todo: Iterable[Trial], experiment: Experiment) -> dict[str, float]:
    """Return seconds per trial by row: the mean of finished ones, else by the work of its models.

    Where rows are finished, others take as much longer or shorter than their work says as those did on average. Rows without
    workloads are taken to last as long as the mean of such rows, or a second.
    """
    taken = seconds_taken(trials)
    if not (unknown := {trial.row for trial in todo} - taken.keys()):
        return taken
    works = {trial.row: _seconds_of_works(experiment, trial) for trial in trials}
    counted = {row: seconds for row, seconds in works.items() if seconds is not None}
    known = sum(counted.get(row, 0.0) for row in taken)
    scale = sum(taken[row] for row in taken if row in counted) / known if known and math.isfinite(known) else 1.0
    others = [seconds for row, seconds in taken.items() if row not in counted]
    moment = mean(others) if others else 1.0
    return taken | {row: scale * counted[row] if row in counted else moment for row in unknown}


def _seconds_of_works(experiment: Experiment, trial: Trial) -> float | None:
    works = experiment.workloads(trial.config, trial.sources)
    return sum(map(_seconds_there(trial.config), works)) if works else None


def _seconds_there(config: Config) -> Callable[[Workload], float]:
    """Seconds of a workload where the trial will run: on this machine, or one published GPU elsewhere."""
    device = config.resolved_device()
    return partial(gpu_seconds, number=1) if is_elsewhere(device) else partial(expected_seconds_here, device=device)


def seconds_taken(trials: Iterable[Trial]) -> dict[str, float]:
    """Return the mean seconds of finished trials, by row."""
    taken: dict[str, list[float]] = {}
    for trial in trials:
        if trial.result() is not None:
            taken.setdefault(trial.row, []).append(read_timing(trial.folder).seconds)
    return {row: mean(seconds) for row, seconds in taken.items()}


def _bar(title: str, seconds: float) -> ProgressBar:
    """Return a progress bar in seconds of expected work: rows differ in length; the remaining time follows the real speed."""
    layout = "{desc} {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left{postfix}"
    return ProgressBar(total=seconds, desc=title.removeprefix("study "), unit="s", layout=layout)
