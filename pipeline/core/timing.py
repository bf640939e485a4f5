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
_DAY_S = 86_400
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
    """Format seconds: `39.9 s`, `12 min 5 s`, `3 h 20 min`, `43 days`, `3 years`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * _DAY_S:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole / _DAY_S:.2g} days" if whole < 99 * _DAY_S else _years(whole / _DAY_S)


def _years(days: float) -> str:
    return f"{days:.0f} days" if days < 1000 else f"{days / 365:,.0f} years"


def byte_size(count: float) -> str:
    """Format bytes, 1,000 to the next unit: `512 B`, `21.3 MB`, `1.2 TB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


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
