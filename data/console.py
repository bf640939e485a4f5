"""Printing that never stops the work: a character that the locale lacks becomes `?`, and output to a closed pipe or terminal
(`| head`, a closed window) is dropped.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_CLOSED = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a closed terminal
_closed: set[int] = set()  # descriptors without a reader


class _DroppingStream(io.RawIOBase):
    """Writes to a descriptor, or nowhere once its reader is gone."""

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
        if self._descriptor in _closed:
            return size
        try:
            return os.write(self._descriptor, content)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in _CLOSED:
                raise
            _closed.add(self._descriptor)
            return size


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside, printing raises neither for a character that the locale lacks nor for a reader that is gone."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stack.enter_context(_replaced(name))
        yield


def has_reader() -> bool:
    """False once a write has found the reader of standard output gone."""
    return 1 not in _closed


@contextmanager
def _replaced(name: str) -> Iterator[None]:
    before = getattr(sys, name)
    is_original = before is getattr(sys, f"__{name}__")
    if not is_original or not isinstance(before, io.TextIOWrapper):  # replaced by a test or a notebook, or closed
        yield
        return
    raw = _DroppingStream(before.fileno())
    _closed.discard(raw.fileno())
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
