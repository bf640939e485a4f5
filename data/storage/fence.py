"""Stop writes below a folder by a process that lost its lease on the folder, and by the workers of such a process.

The process that holds the lease checks it before each write. Its workers, on this machine or another, inherit FENCE_VARIABLE and check
before each write that the lease still has their parent's token.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FENCE_VARIABLE = "NOISY_STUDENT_FENCE"

_guards: dict[
    str, Callable[[], str]
] = {}  # URL of a folder → function that gives the reason not to write there now, or ""


def guard_writes(folder: str, reason: Callable[[], str]) -> None:
    """Call `reason` before every write of this process below `folder`; if it returns a text, the write fails with that text."""
    _guards[folder] = reason


def unguard_writes(folder: str) -> None:
    """Undo `guard_writes` for this folder."""
    _guards.pop(folder, None)


@contextmanager
def workers_fenced(folder: str, lease: str, token: str) -> Iterator[None]:
    """Let processes started in the block write below `folder` only while the JSON file `lease` has this `token`.

    They must inherit this process's environment, or be given FENCE_VARIABLE.
    """
    fence = {"folder": folder, "lease": lease, "token": token, "by": _this_process()}
    before = os.environ.get(FENCE_VARIABLE)
    os.environ[FENCE_VARIABLE] = json.dumps(fence)
    try:
        yield
    finally:
        if before is None:
            del os.environ[FENCE_VARIABLE]
        else:
            os.environ[FENCE_VARIABLE] = before


def reason_not_to_write(url: str, read: Callable[[str], bytes]) -> str:
    """Why this process must not write a file; empty when it may. `read` returns a file's bytes or raises FileNotFoundError."""
    for folder, reason in _guards.items():
        if _is_below(url, folder) and (why := reason()):
            return why
    if (variable := os.environ.get(FENCE_VARIABLE)) is None:
        return ""
    fence: dict[str, Any] = json.loads(variable)
    if not _is_below(url, fence["folder"]) or url == fence["lease"] or fence["by"] == _this_process():
        return ""
    if _token(fence["lease"], read) == fence["token"]:
        return ""
    return f"{fence['folder']}: the process that started this one lost its lock there; {url} is not written"


def _token(lease: str, read: Callable[[str], bytes]) -> str:
    try:
        return str(json.loads(read(lease))["token"])
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError):
        return ""


def _is_below(url: str, folder: str) -> bool:
    return f"{url}/".startswith(folder.rstrip("/") + "/")


def _this_process() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"
