"""Failpoints: named steps of a commit at which a test kills the process, to see what the next one makes of it."""

from __future__ import annotations

import itertools
import os
import signal
from fnmatch import fnmatchcase

VARIABLE = "NSP_FAILPOINT"
_reached = itertools.count(1)


def reach(name: str) -> None:
    """Nothing, but for a process whose environment has NSP_FAILPOINT=PATTERN[:N]: it is killed (SIGKILL) at the N-th name
    that the pattern matches; N is 1 by default."""
    pattern, _, number = os.environ.get(VARIABLE, "").partition(":")
    if pattern and fnmatchcase(name, pattern) and next(_reached) == int(number or 1):
        os.kill(os.getpid(), signal.SIGKILL)
