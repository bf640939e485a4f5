"""How long the trials that are left will take, here and on GPUs, for `plan=true`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from pipeline.core.timing import duration
from pipeline.models.expected_time import GPU_STEP_S, GPUS, LIMIT_S, gpu_seconds
from pipeline.trials.tasks import resources_of
from pipeline.trials.trial import Experiment, Trial, expected_seconds


def describe_remaining(trials: Sequence[Trial], experiment: Experiment, unit: str) -> str:
    """Describe how long the missing trials take here and on GPUs: from finished ones of the row, else from their work.

    Args:
        unit: what the trials are, in the plural.
    """
    todo = [trial for trial in trials if trial.result() is None]
    if not todo:
        return f"all {unit} are done"
    cpus = os.cpu_count() or 1
    seconds = expected_seconds(trials, todo, experiment)
    needed = max(experiment.cpus(trial.config) for trial in todo)
    resources = resources_of(todo[0].config, [cpus], needed)
    at_once = min(len(todo), max(1, int(cpus // resources["num_cpus"])))
    here = sum(seconds[trial.row] for trial in todo) / at_once
    takes = f"over {duration(LIMIT_S)}" if math.isinf(here) else f"about {duration(here)}"
    measured = len({trial.row for trial in trials if trial.result() is not None} & {trial.row for trial in todo})
    how = f"; {measured} rows by their {unit} that are done" if measured else ""
    return (
        f"{len(todo)} {unit} to make take {takes} on this machine, {at_once} at once; {_on_gpus(todo, experiment)}\n"
        f"(here by timing models and loading for a moment{how}; GPUs by FLOPs from published figures, one trial each, at least "
        f"{1000 * GPU_STEP_S:.0f} ms a step)"
    )


def _on_gpus(todo: Sequence[Trial], experiment: Experiment) -> str:
    """Describe how long trials take on 1, 8 and 64 GPUs; none is spread over several."""
    works = {trial.row: experiment.workloads(trial.config, trial.sources) for trial in todo}
    seconds = {row: sum(gpu_seconds(work, 1) for work in some) for row, some in works.items()}
    total, longest = sum(seconds[trial.row] for trial in todo), max(seconds.values())
    return ", ".join(f"{duration(max(total / number, longest))} on {number} GPU{'s' * (number > 1)}" for number in GPUS)
