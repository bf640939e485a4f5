"""Memory of a worker process: a task for an executor of `teacher.selection`; a module of its own, as tasks must be importable."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.timing import peak_memory


def own_memory_of_worker(shards: Iterable[str]) -> int:  # noqa: ARG001 (an executor's task)
    """Most bytes that the process which does this had resident, without files in memory: the first process has the same
    libraries, and the system keeps them once. 0 where it does not tell."""
    peak = peak_memory()
    if peak is None:
        return 0
    shared = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return peak - (int(shared[1]) * 1024 if shared else 0)
