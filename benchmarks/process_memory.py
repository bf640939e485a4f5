"""Peak memory of a process that works for a benchmark: a task for `teacher.processes`, whose tasks have to be importable."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.effort import peak_memory


def peak_memory_of_worker(shards: Iterable[str]) -> int:  # noqa: ARG001 (an executor's task)
    """Most bytes that the process which does this had resident; 0 where the system does not tell."""
    return peak_memory() or 0
