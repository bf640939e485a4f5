"""Memory of a benchmark's processes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.timing import peak_memory


def own_memory_of_worker(shards: Iterable[str]) -> int:  # noqa: ARG001 (an executor's task)
    """Peak resident bytes of this process without mapped files (libraries, which the system holds once); 0 if not known."""
    peak = peak_memory()
    if peak is None:
        return 0
    shared = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return peak - (int(shared[1]) * 1024 if shared else 0)


def private_memory() -> int:
    """Bytes that this process alone holds (USS): neither libraries' files nor pages of a parent that it has not written."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(number) for number in re.findall(r"Private_\w+:\s+(\d+) kB", rollup))
