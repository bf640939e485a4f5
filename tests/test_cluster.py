"""Starting Ray: what it must not take away from the command that starts it."""

from __future__ import annotations

import subprocess
import sys

import pytest

STOPPED_AS_RAY_CONNECTS = """
import os, signal, sys, time
from ray._private import worker
from pipeline import cluster, interrupt

worker.listen_error_messages = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # Ray's own handlers are in place then
try:
    with interrupt.handled():
        cluster.start_ray(None)
        time.sleep(30)
except interrupt.Interrupted as stop:
    time.sleep(4)  # Ray's handler has an alarm ring after 3 seconds, which aborts the process
    sys.exit(stop.exit_code)
"""


@pytest.mark.slow
def test_sigterm_as_ray_connects_ends_the_command_as_sigterm() -> None:
    command = [sys.executable, "-c", STOPPED_AS_RAY_CONNECTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "SIGTERM received" in done.stderr  # by Ray's handler: this is the moment that is meant
    assert done.returncode == 143, done.stderr
