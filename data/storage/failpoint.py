"""Failpoints: named steps at which a test kills the process, to see that the next one continues from what is there."""

from __future__ import annotations

import itertools
import os
import signal
from fnmatch import fnmatchcase

VARIABLE = "NSP_FAILPOINT"
_matched = itertools.count(1)


def failpoint(name: str) -> None:
    """Kill this process (SIGKILL) at the N-th name that matches NSP_FAILPOINT=PATTERN[:N]; N is 1 by default."""
    pattern, _, number = os.environ.get(VARIABLE, "").partition(":")
    if pattern and fnmatchcase(name, pattern) and next(_matched) == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
