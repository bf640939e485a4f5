"""The time and memory that a stage has taken over all its runs: `seconds.json` beside its output. No output depends on it."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data import storage
from data.json_files import read_if_usable

SECONDS_NAME = "seconds.json"
_MAX_RUNS = 1000  # newest runs whose times are kept


@dataclass(frozen=True)
class Timing:
    """The cost of a stage.

    Attributes:
        seconds: wall-clock time of all runs.
        runs: (start, end) of each run as Unix times, oldest first.
        peak_memory: peak resident bytes of the process that leads the stage; None where the system does not tell.
    """

    seconds: float = 0.0
    runs: tuple[tuple[float, float], ...] = ()
    peak_memory: int | None = None


def read_timing(folder: str) -> Timing:
    """Read `seconds.json`; all zero when it is missing or damaged. Raises StorageError when it cannot be read."""
    return read_if_usable(storage.join(folder, SECONDS_NAME), Timing) or Timing()


class Clock:
    """Measures one run of a stage, from its construction on."""

    def __init__(self) -> None:
        self._at, self._started = time.time(), time.monotonic()
        _reset_peak_memory()

    def add_to(self, folder: str) -> None:
        """Add the run so far to the stage's `seconds.json`."""
        before, seconds = read_timing(folder), time.monotonic() - self._started
        runs = [*before.runs, (round(self._at, 1), round(self._at + seconds, 1))]
        peak = max((value for value in (before.peak_memory, peak_memory()) if value is not None), default=None)
        values = {"seconds": round(before.seconds + seconds, 1), "runs": runs[-_MAX_RUNS:], "peak_memory": peak}
        storage.write_text(storage.join(folder, SECONDS_NAME), json.dumps(values) + "\n")


def duration(seconds: float) -> str:
    """Format seconds: `39.9 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _reset_peak_memory() -> None:
    """Reset the peak (Linux); elsewhere a stage's peak includes the earlier stages of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Peak resident bytes of this process; None where the system does not tell. Not `ru_maxrss`, which starts at the parent's size."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
