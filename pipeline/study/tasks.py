"""Long tasks on Ray, one item each: what they reserve, how many fit at once, and their results as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.cluster import user_error
from pipeline.fields import Config

_TICK_S = 5.0
Item = TypeVar("Item")
Result = TypeVar("Result")


def resources_of(config: Config) -> dict[str, float]:
    """What Ray reserves for one training: its threads and loading processes, or a whole node when that has fewer CPUs."""
    nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
    cpus = config.threads + config.teacher.loader_workers
    return {"num_cpus": min(cpus, max(nodes)), "num_gpus": 1 if config.resolved_device() == "cuda" else 0}


def room_for(resources: Mapping[str, float]) -> int:
    """Trainings that fit at once."""
    there = ray.cluster_resources()
    room = there.get("CPU", 1) // resources["num_cpus"]
    if resources["num_gpus"]:
        room = min(room, there.get("GPU", 0) // resources["num_gpus"])
    return max(1, int(room))


def in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Mapping[str, float],
    tick: Callable[[], object] = lambda: None,
) -> Iterator[tuple[Item, Result]]:
    """Items with what `function` returns of them in Ray tasks, as they end. A worker that dies is replaced, three times a task.

    An error cancels the other tasks and is raised as the task raised it.
    """
    task = ray.remote(function).options(**resources)
    pending = {task.remote(item): item for item in items}
    try:
        while pending:
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=_TICK_S)
            for reference in ended:
                yield pending.pop(reference), ray.get(reference)
            tick()
    except RayTaskError as error:
        raise user_error(error) from None
    finally:
        for reference in pending:
            ray.cancel(reference)
