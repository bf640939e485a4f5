"""One writer per run directory: a file lock locally, a lease with a heartbeat on an object store.

The lease is a file that its holder writes again every BEAT_S, each time on the condition that it is still the version it has read
(a conditional put): of two starters one succeeds. Where it could not be renewed for LEASE_S, another may take it over, so its
holder stops: this process can no longer write below the run directory, and its main thread is interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from data import storage
from data.json_files import parse_json
from data.manifest import DataError
from data.redact import redacted

LEASE_S, BEAT_S = 60.0, 15.0
_HOLDER = "lock.json"


class LockedError(ValueError):
    """Another process writes to this run directory; the message names it."""


@contextmanager
def run_lock(run_dir: str, command: str) -> Iterator[None]:
    """Hold a run directory for writing.

    Raises:
        LockedError: at once, when another process holds it; on an object store also later, when the lease is lost.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "command": redacted(command), "token": uuid.uuid4().hex}
    with _file_lock(run_dir, me) if storage.is_local(run_dir) else _lease(run_dir, me):
        yield


def read_holder(run_dir: str) -> dict[str, Any]:
    """Who writes to a run directory now, as far as can be seen from here: host, pid, command. Empty when nobody does."""
    url = storage.join(run_dir, _HOLDER)
    if not storage.is_local(run_dir):
        holder = _parse((storage.read_text_if_there(url) or "").encode())
        return holder if time.time() - float(holder.get("beat", 0)) < LEASE_S else {}
    holder = _local_holder(url)
    return holder if holder and (holder.get("host") != socket.gethostname() or _lives(holder.get("pid"))) else {}


def _lives(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def _file_lock(run_dir: str, me: dict[str, Any]) -> Iterator[None]:
    folder = storage.local_path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    url = storage.join(run_dir, _HOLDER)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(_refusal(run_dir, _local_holder(url))) from None
    try:
        storage.write_text(url, json.dumps(me) + "\n")
        yield
    finally:
        storage.remove(url)
        lock.release()


def _local_holder(url: str) -> dict[str, Any]:
    try:
        return _parse(storage.read_bytes(url))
    except OSError:  # not written yet, or removed just now
        return {}


@contextmanager
def _lease(run_dir: str, me: dict[str, Any]) -> Iterator[None]:
    lease = _Lease(run_dir, me)
    lease.acquire()
    try:
        with lease.renewed_in_the_background():
            yield
    except BaseException:
        if lease.lost:
            raise LockedError(lease.lost) from None
        raise
    finally:
        storage.allow_writes(run_dir)


class _Lease:
    """This process's claim on a run directory in an object store."""

    def __init__(self, run_dir: str, me: dict[str, Any]) -> None:
        self.lost = ""  # why, once it is
        self._run_dir, self._me = run_dir, me
        self._url = storage.join(run_dir, _HOLDER)
        self._stop = threading.Event()
        self._renewed_at = 0.0  # monotonic, when the last renewal that succeeded began
        self._problem = "no answer"

    def acquire(self) -> None:
        """Raises LockedError when another holds it."""
        self._renewed_at = time.monotonic()
        holder, tag = self._read()
        if tag is not None:
            if time.time() - float(holder.get("beat", 0)) < LEASE_S:
                raise LockedError(_refusal(self._run_dir, holder))
            # a living holder whose clock differs from ours beats meanwhile; then the version that we have seen is gone
            print(f"{self._run_dir}: {_name(holder)} has not renewed its lock; taking it over in {1.5 * BEAT_S:.0f} s")
            time.sleep(1.5 * BEAT_S)
            self._renewed_at = time.monotonic()
        if not self._write(tag):
            raise LockedError(_refusal(self._run_dir, self._read()[0]))

    @contextmanager
    def renewed_in_the_background(self) -> Iterator[None]:
        """Keep the lease while the block runs, then give it up."""
        threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(BEAT_S)  # a renewal that hangs cannot do harm: the version it would write over will be gone
            with suppress(storage.StorageError):  # it lapses
                self._release()

    def _release(self) -> None:
        if not self.lost and self._read()[0].get("token") == self._me["token"]:
            storage.remove(self._url)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S) and not self.lost:
            began = time.monotonic()
            try:
                holder, tag = self._read()
                if (tag is None or holder.get("token") == self._me["token"]) and self._write(tag):
                    self._renewed_at = began
                else:
                    self._lose(f"{_name(self._read()[0])} has taken it over")
            except storage.StorageError as error:  # the next beat tries again; _watch says when it is too late
                self._problem = str(error)

    def _watch(self) -> None:
        """A renewal may hang: what ends the lease is the clock alone."""
        while not self._stop.wait(LEASE_S / 60):
            if not self.lost and time.monotonic() - self._renewed_at > LEASE_S:
                self._lose(f"it could not be renewed for {LEASE_S:.0f} s ({self._problem})")

    def _lose(self, reason: str) -> None:
        self.lost = f"{self._run_dir}: this process lost its lock and stopped: {reason}. The same command continues"
        storage.forbid_writes(self._run_dir, self.lost)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """The holder and its file's version; nobody and None when there is no file."""
        try:
            content, tag = storage.read_version(self._url)
        except FileNotFoundError:
            return {}, None
        return _parse(content), tag

    def _write(self, tag: str | None) -> bool:
        """Write our name over the version `tag`. False when another version is there."""
        content = json.dumps(self._me | {"beat": time.time()}) + "\n"
        try:
            storage.write_if(self._url, content.encode(), tag)
        except storage.ChangedError:  # by our own write, if its answer was lost
            return self._read()[0].get("token") == self._me["token"]
        return True


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return parse_json(content, _HOLDER, "", _Holder)
    except DataError:  # nobody's
        return {}


class _Holder(BaseModel):
    """What is read of the file, where it says so."""

    pid: int | None = None
    host: str | None = None
    command: str | None = None
    beat: float = 0.0
    token: str | None = None


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} ({holder.get('command', 'unknown command')})"


def _refusal(run_dir: str, holder: dict[str, Any]) -> str:
    return f"{run_dir} is in use by {_name(holder)}; wait for it to end, or choose another run_dir="
