"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): the stage saves its work, and the command ends and says how to continue."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked this process to stop. A BaseException like KeyboardInterrupt, so that `except Exception` lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_pending: int | None = None
_deferred = 0
_abandoned = False


def _handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (signal's interface)
    global _pending
    _pending = number
    if not _deferred:
        raise Interrupted(number)


@contextmanager
def handled() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread. An ignored SIGHUP (nohup) stays ignored."""
    global _pending, _abandoned
    _pending, _abandoned = None, False
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Interrupted):  # Ray's compiled calls wrap it
            raise error.__cause__ from None
        raise
    finally:
        _pending = None
        for number, handler in before.items():
            signal.signal(number, handler)


def pending() -> bool:
    """Whether a signal arrived inside `deferred`."""
    return _pending is not None


def abandon() -> None:
    """Interrupt the main thread like Ctrl-C, but without saving: this process must not write any more."""
    global _abandoned
    _abandoned = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def may_save() -> bool:
    """False after `abandon`."""
    return not _abandoned


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, hold signals back, for code that must finish a step first; raise Interrupted when the block ends."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if _pending is not None and not _deferred:
        raise Interrupted(_pending)
