"""Run work as Ray tasks: the resources to reserve, how many fit at once, results as they finish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import ray

from pipeline.core.ray_runtime import as_finished
from pipeline.core.schema import Config

GPU_SHARE = 0.6  # over half: one training per GPU; the rest is for what a training starts, as a labeling actor
Item = TypeVar("Item")
Result = TypeVar("Result")


def ray_nodes() -> list[float]:
    """Return the number of CPUs of each of Ray's nodes."""
    return [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]


def training_cpus(config: Config) -> int:
    """Return the CPUs that a training of teacher or student uses: its threads and loading processes."""
    return config.threads + max(config.teacher.loader_workers, config.student.loader_workers)


def resources_of(config: Config, nodes: Sequence[float], cpus: int) -> dict[str, float]:
    """Return what Ray reserves for one task: `cpus`, at most a whole node; `nodes`: CPUs of each."""
    return {"num_cpus": min(cpus, max(nodes)), "num_gpus": GPU_SHARE if config.resolved_device() == "cuda" else 0}


def max_concurrent(resources: Mapping[str, float]) -> int:
    """Return how many tasks fit at once, at least 1."""
    available = ray.cluster_resources()
    number = available.get("CPU", 1) // resources["num_cpus"]
    if resources["num_gpus"]:
        number = min(number, available.get("GPU", 0))
    return max(1, int(number))


def in_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    resources: Mapping[str, float],
    tick: Callable[[], object] = lambda: None,
    needs: Sequence[int | None] = (),
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, `function(item)`) as Ray tasks finish; `tick` and errors as for `as_finished`.

    Args:
        needs: per item, the index of an earlier item that must finish first, or None; empty: no item needs another.
    """
    task = ray.remote(lambda item, *_: function(item)).options(**resources)
    references: list[ray.ObjectRef] = []
    for index, item in enumerate(items):
        needed = needs[index] if needs else None
        references.append(task.remote(item, *([] if needed is None else [references[needed]])))
    return as_finished(zip(references, items, strict=True), tick=tick)
