"""One writer per run directory: a file lock locally, a lease with a heartbeat on an object store."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from filelock import FileLock, Timeout

from data import storage

_LEASE_S, _BEAT_S = 60.0, 15.0
_HOLDER = "lock.json"


class LockedError(ValueError):
    """Another process writes to this run directory; the message names it."""


@contextmanager
def run_lock(run_dir: str, command: str) -> Iterator[None]:
    """Hold a run directory for writing.

    Raises:
        LockedError: at once, when another process holds it.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "command": command, "token": uuid.uuid4().hex}
    with _file_lock(run_dir, me) if storage.is_local(run_dir) else _lease(run_dir, me):
        yield


@contextmanager
def _file_lock(run_dir: str, me: dict[str, Any]) -> Iterator[None]:
    folder = storage.local_path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(_refusal(run_dir, _holder(run_dir))) from None
    try:
        storage.write_text(storage.join(run_dir, _HOLDER), json.dumps(me) + "\n")
        yield
    finally:
        storage.remove(storage.join(run_dir, _HOLDER))
        lock.release()


@contextmanager
def _lease(run_dir: str, me: dict[str, Any]) -> Iterator[None]:
    """A lease lapses when its heartbeat is older than a minute. Last writer wins a race; it is read back after a pause."""
    url = storage.join(run_dir, _HOLDER)
    holder = _holder(run_dir)
    if holder and time.time() - float(holder.get("beat", 0)) < _LEASE_S:
        raise LockedError(_refusal(run_dir, holder))
    _beat(url, me)
    time.sleep(1)
    if _holder(run_dir).get("token") != me["token"]:
        raise LockedError(_refusal(run_dir, _holder(run_dir)))
    stop = threading.Event()
    thread = threading.Thread(target=_keep_beating, args=(url, me, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        storage.remove(url)


def _keep_beating(url: str, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(_BEAT_S):
        _beat(url, me)


def _beat(url: str, me: dict[str, Any]) -> None:
    storage.write_text(url, json.dumps(me | {"beat": time.time()}) + "\n")


def _holder(run_dir: str) -> dict[str, Any]:
    url = storage.join(run_dir, _HOLDER)
    try:
        return dict(json.loads(storage.read_text(url)))
    except (OSError, ValueError):
        return {}


def _refusal(run_dir: str, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} ({holder.get('command', 'unknown command')})"
    return f"{run_dir} is in use by {who}; wait for it to end, or choose another run_dir="
