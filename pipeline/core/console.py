"""What a command prints is for people: where it cannot be written, the work goes on.

A locale without the sign shows `?` in its place; what is printed into a pipe or terminal that is gone (`| head`, a closed window) is
dropped.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_GONE = (errno.EPIPE, errno.EIO)  # a pipe's reader, a terminal
_broken: set[int] = set()  # descriptors that nobody reads any more


class _Forgiving(io.RawIOBase):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, content: object) -> int:
        size = len(memoryview(content))  # type: ignore[arg-type]
        if self._descriptor in _broken:
            return size
        try:
            return os.write(self._descriptor, content)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in _GONE:
                raise
            _broken.add(self._descriptor)
            return size


@contextmanager
def forgiving() -> Iterator[None]:
    """Inside, printing raises neither for a sign that the locale does not know nor for a reader that is gone."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stack.enter_context(_replaced(name))
        yield


def is_read() -> bool:
    """False once the reader of standard output is known to be gone."""
    return 1 not in _broken


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    before = getattr(sys, name)
    if before is not getattr(sys, f"__{name}__") or not isinstance(
        before, io.TextIOWrapper
    ):  # of a test, a notebook, closed
        yield
        return
    raw = _Forgiving(before.fileno())
    _broken.discard(raw.fileno())
    before.flush()
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw),
        before.encoding,
        errors="replace",
        line_buffering=before.line_buffering or name == "stderr",
    )
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.flush()
        setattr(sys, name, before)
