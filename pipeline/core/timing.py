"""What a stage has cost so far, over all its runs: `seconds.json` beside its output. For people; nothing is made from it."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from data import storage
from data.json_files import read_json

EFFORT_NAME = "seconds.json"
_MAX_RUNS = 1000  # that are remembered one by one


@dataclass(frozen=True)
class Effort:
    """
    Attributes:
        seconds: wall-clock time of all runs.
        runs: Unix times at which each began and ended, oldest first.
        peak_memory: most bytes resident in the process that led the stage; None where the system does not tell.
    """

    seconds: float = 0.0
    runs: tuple[tuple[float, float], ...] = ()
    peak_memory: int | None = None


def read_effort(folder: str) -> Effort:
    """What is known of a stage's runs; nothing is where none has ended, or the file is damaged."""
    try:
        values = read_json(storage.join(folder, EFFORT_NAME), "", _Values)
        runs = tuple((float(start), float(end)) for start, end in values.get("runs", ()))
    except FileNotFoundError:
        return Effort()
    except ValueError as error:  # of another shape; an outage is no answer
        if isinstance(error, storage.StorageError):
            raise
        return Effort()
    return Effort(float(values["seconds"]), runs, values.get("peak_memory"))


class _Values(BaseModel):
    """`seconds.json`."""

    seconds: float
    runs: list[list[float]] = []
    peak_memory: int | None = None


class Clock:
    """Measures one run of a stage, from now on."""

    def __init__(self) -> None:
        self._at, self._started = time.time(), time.monotonic()
        _forget_peak_memory()

    def add_to(self, folder: str) -> None:
        """Add the run, up to now, to what is known of the stage."""
        before, seconds = read_effort(folder), time.monotonic() - self._started
        runs = [*before.runs, (round(self._at, 1), round(self._at + seconds, 1))]
        peak = max((value for value in (before.peak_memory, peak_memory()) if value is not None), default=None)
        values = {"seconds": round(before.seconds + seconds, 1), "runs": runs[-_MAX_RUNS:], "peak_memory": peak}
        storage.write_text(storage.join(folder, EFFORT_NAME), json.dumps(values) + "\n")


def duration(seconds: float) -> str:
    """`39.9 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _forget_peak_memory() -> None:
    """Linux counts from here on; elsewhere a later stage's peak includes that of those before it in the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Most bytes that were resident, of this process alone; None where the system does not tell. (`ru_maxrss` begins with what the
    parent had when it forked.)"""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
