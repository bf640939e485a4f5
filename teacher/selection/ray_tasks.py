"""Sharing shards out among tasks on a Ray cluster, as threads.py does among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.core.ray_runtime import user_error
from teacher.selection.threads import Progress, Result

_MAX_TASKS = 64  # each may return a histogram of some MB


def in_ray_tasks(
    task: Callable[[Iterable[str]], Result],
    shards: Sequence[str],
    num_workers: int,
    doing: str,
    progress: Progress | None = None,
) -> Iterator[Result]:
    """What `task` returns in each of `num_workers` Ray tasks of one CPU, as they end; each has a fixed part of the shards.

    When a node dies, Ray runs its task again on another. An error is raised as the task raised it. The other tasks are not cancelled,
    but end with this process or before: cancelling one at the moment when it ends brings this process down (Ray 2.60, "Tried to
    complete task that was not pending").
    """
    num_tasks = min(num_workers, len(shards), _MAX_TASKS)
    shared_task = ray.put(task)
    parts = [shards[first::num_tasks] for first in range(num_tasks)]
    pending: dict[ray.ObjectRef[Any], int] = {_run.remote(shared_task, part): len(part) for part in parts}
    done = 0
    try:
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1, fetch_local=False)
            result = ray.get(ended)
            done += pending.pop(ended)
            if progress:
                progress(doing, done, len(shards))
            yield result
    except RayError as error:
        raise user_error(error) from None


@ray.remote(num_cpus=1)
def _run(task: Callable[[Iterable[str]], Any], shards: Sequence[str]) -> Any:
    return task(shards)
