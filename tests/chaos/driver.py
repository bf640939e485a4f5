"""Run a command of the pipeline as a child process; find and stop the processes that it starts."""

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
_GONE_S = 20.0  # limit for the processes of a stopped driver to end
# After a raylet is killed, Ray's agents try for minutes to report it to Ray's head; they hold and write nothing of ours.
# Until Ray has titled them, they are known by their files.
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "/dashboard/agent.py", "/runtime_env/agent/main.py")


class Driver:
    """Run `python -m pipeline.run WORDS…`, or another module.

    Args:
        log: file to append the output to.
        failpoint: see `data.storage.failpoint`; Ray workers inherit it.
    """

    def __init__(self, words: list[str], log: Path, failpoint: str = "", module: str = "pipeline.run") -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: failpoint}
        self._log, self._start = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as file:
            self.process = psutil.Popen(
                [sys.executable, "-m", module, *words], stdout=file, stderr=subprocess.STDOUT, env=environment
            )

    def output(self) -> str:
        """The output of this command so far."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace")

    def last_words(self) -> str:
        """The last three lines of the output, joined to one."""
        return " | ".join(self.output().replace("\r", "\n").strip().splitlines()[-3:])[-600:]

    @property
    def is_running(self) -> bool:
        """Whether the command is still running."""
        return bool(self.process.poll() is None)

    def family(self) -> list[psutil.Process]:
        """All processes that the command started and that still run: Ray's, and the workers."""
        with suppress(psutil.Error):
            return list(self.process.children(recursive=True))
        return []

    def workers(self) -> list[psutil.Process]:
        """The command's labeling workers."""
        return labeling_workers(self.family())

    def wait(self) -> int:
        """Wait for the command; return its exit code, negative for a signal."""
        return int(self.process.wait(timeout=_LIMIT_S))

    def wait_for(self, condition: Callable[[], object]) -> bool:
        """Wait until the condition holds; return False if the command ends before."""
        deadline = time.monotonic() + _LIMIT_S
        while not condition():
            if not self.is_running:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"the condition did not hold within {_LIMIT_S:.0f} s:\n{self.output()}")
            time.sleep(0.02)
        return True

    def stop(self, number: signal.Signals) -> tuple[int, float, list[psutil.Process]]:
        """Send a signal to the command, not to its children.

        Returns:
            The exit code, the seconds until it ended, and the processes that it had started.
        """
        family, started = self.family(), time.monotonic()
        self.process.send_signal(number)
        code = self.wait()
        return code, time.monotonic() - started, family


def labeling_workers(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that Ray has titled with the labeling actor's name."""
    return [process for process in processes if title(process).startswith("ray::Labeler")]


def left_over(processes: list[psutil.Process]) -> list[str]:
    """Kill the processes that do not end within 20 s, except Ray's agents; return the number and title of each."""
    ours = [process for process in processes if not any(agent in title(process) for agent in _AGENTS)]
    _, alive = psutil.wait_procs(ours, timeout=_GONE_S)
    described = [f"{process.pid} {title(process)}" for process in alive]
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    return described


def title(process: psutil.Process) -> str:
    """A process's command line, which Ray sets to what the worker does; empty if it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
