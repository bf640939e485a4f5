"""A command line of the pipeline as a process of its own, with all processes that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from data.storage.failpoint import VARIABLE

_LIMIT_S = 400.0
_GONE_S = 20.0  # for what a driver leaves behind to end by itself
# After a raylet that was killed, Ray's own agents try for minutes to report that to its head; they hold and write nothing of ours.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


class Driver:
    """Runs `python -m pipeline.run WORDS…`, or another module.

    Args:
        log: its output is appended here.
        failpoint: see `data.storage.failpoint`; its Ray workers inherit it.
    """

    def __init__(self, words: list[str], log: Path, failpoint: str = "", module: str = "pipeline.run") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: failpoint}
        self._log, self._start = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", module, *words], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def output(self) -> str:
        """What this command has printed."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def last_words(self) -> str:
        """The last of it, in one line."""
        return " | ".join(self.output().replace("\r", "\n").strip().splitlines()[-3:])[-600:]

    @property
    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return bool(self.process.poll() is None)

    def family(self) -> list[psutil.Process]:
        """All processes that it started and that are there now: Ray's, and the workers."""
        with suppress(psutil.Error):
            return list(self.process.children(recursive=True))
        return []

    def workers(self) -> list[psutil.Process]:
        """Its labeling workers."""
        return labeling_workers(self.family())

    def wait(self) -> int:
        """The exit code; negative for a signal."""
        return int(self.process.wait(timeout=_LIMIT_S))

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until something holds; False when the command ends before."""
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            if not self.is_running:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing came of it in {_LIMIT_S:.0f} s:\n{self.output()}")
            time.sleep(0.02)
        return True

    def stop(self, number: signal.Signals) -> tuple[int, float, list[psutil.Process]]:
        """Send a signal to the command alone.

        Returns:
            Its exit code, the seconds that it took, and the processes that it had started.
        """
        family, started = self.family(), time.monotonic()
        self.process.send_signal(number)
        code = self.wait()
        return code, time.monotonic() - started, family


def labeling_workers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that Ray has named after the labeling actor."""
    return [process for process in processes if title(process).startswith("ray::Labeler")]


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end by themselves in a while, Ray's agents aside; they are ended then."""
    ours = [process for process in processes if not title(process).startswith(_AGENTS)]
    _, alive = psutil.wait_procs(ours, timeout=_GONE_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    return list(alive)


def title(process: psutil.Process) -> str:
    """Its command line, by which Ray tells what a worker does; empty when it is gone."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
