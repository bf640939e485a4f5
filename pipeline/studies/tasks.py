"""Long tasks on Ray, one item each: what they reserve, how many fit at once, and their results as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import ray
from ray.exceptions import RayError

from pipeline.core.ray_runtime import user_error
from pipeline.core.schema import Config

_TICK_S = 5.0
GPU_SHARE = (
    0.6  # more than half: one training per GPU; what a training starts itself, as a labeling actor, has the rest
)
Item = TypeVar("Item")
Result = TypeVar("Result")


def ray_nodes() -> list[float]:
    """CPUs of each node that Ray has."""
    return [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]


def resources_of(config: Config, nodes: Sequence[float]) -> dict[str, float]:
    """What Ray reserves for one training: its threads and loading processes, or a whole node when that has fewer CPUs.

    Args:
        nodes: CPUs of each.
    """
    cpus = config.threads + max(config.teacher.loader_workers, config.student.loader_workers)
    return {"num_cpus": min(cpus, max(nodes)), "num_gpus": GPU_SHARE if config.resolved_device() == "cuda" else 0}


def room_for(resources: Mapping[str, float]) -> int:
    """Trainings that fit at once."""
    there = ray.cluster_resources()
    room = there.get("CPU", 1) // resources["num_cpus"]
    if resources["num_gpus"]:
        room = min(room, there.get("GPU", 0))
    return max(1, int(room))


def in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Mapping[str, float],
    tick: Callable[[], object] = lambda: None,
    needs: Sequence[int | None] = (),
) -> Iterator[tuple[Item, Result]]:
    """Items with what `function` returns of them in Ray tasks, as they end. A worker that dies is replaced, three times a task.

    An error is raised as the task raised it; the other tasks end with this process (why they are not cancelled:
    `teacher.executors.in_ray_tasks`).

    Args:
        needs: for each item, the place of an earlier one that must have ended before it starts; empty: none needs another.
    """
    task = ray.remote(lambda item, *_: function(item)).options(**resources)
    references: list[ray.ObjectRef] = []
    for place, item in enumerate(items):
        before = needs[place] if needs else None
        references.append(task.remote(item, *([] if before is None else [references[before]])))
    pending = dict(zip(references, items, strict=True))
    try:
        while pending:
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=_TICK_S)
            for reference in ended:
                yield pending.pop(reference), ray.get(reference)
            tick()
    except RayError as error:
        raise user_error(error) from None
