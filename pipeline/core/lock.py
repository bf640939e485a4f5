"""One writer per run directory: a file lock locally, a lease with a heartbeat on an object store.

The lease is a file. Its holder rewrites it every BEAT_S, each time only if it is still the version last read (a conditional put), so
of two starters one succeeds. A store that ignores such conditions is refused. After LEASE_S without a renewal another process may take
the lease over. Its former holder then stops: it and its workers can no longer write below the run directory (`data.storage.fence`),
and its main thread is interrupted without saving.
"""

from __future__ import annotations

import json
import os
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
from data.errors import DataError
from data.json_files import parse_json
from data.storage import fence
from data.storage.redact import redacted
from pipeline.core import interrupt

LEASE_S, BEAT_S = 60.0, 15.0
_HOLDER = "lock.json"
_NO_VERSION = '"00000000000000000000000000000000"'

wall_clock, sleep = time.time, time.sleep


def clock() -> float:
    """Monotonic seconds, which also pass while this machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class LockedError(ValueError):
    """Another process writes to this run directory; the message names it."""


@contextmanager
def run_lock(run_dir: str, command: str) -> Iterator[None]:
    """Lock a run directory for writing.

    Raises LockedError: at once, when another process holds it; on an object store also later, when the lease is lost.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "command": redacted(command), "token": uuid.uuid4().hex}
    with _file_lock(run_dir, me) if storage.is_local(run_dir) else _lease(run_dir, me):
        yield


def read_holder(run_dir: str) -> dict[str, Any]:
    """The process that holds the lock of a run directory (host, pid, command); empty when none does. Needs no lock."""
    url = storage.join(run_dir, _HOLDER)
    if not storage.is_local(run_dir):
        holder = _parse((storage.read_text_if_there(url) or "").encode())
        return holder if wall_clock() - float(holder.get("beat", 0)) < LEASE_S else {}
    holder = _local_holder(url)
    return holder if holder and (holder.get("host") != socket.gethostname() or _is_alive(holder.get("pid"))) else {}


def _is_alive(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # alive, of another user
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
    except OSError:  # not written yet, or just removed
        return {}


@contextmanager
def _lease(run_dir: str, me: dict[str, Any]) -> Iterator[None]:
    lease = Lease(run_dir, me)
    lease.acquire()
    fence.guard_writes(run_dir, lease.why_lost)
    try:
        with fence.workers_fenced(run_dir, lease.url, me["token"]), lease.renewed_in_the_background():
            yield
    except BaseException:
        if lease.lost:
            raise LockedError(lease.lost) from None
        raise
    finally:
        if not lease.lost:  # else threads that still run could write again
            fence.unguard_writes(run_dir)


class Lease:
    """This process's claim on a run directory in an object store."""

    def __init__(self, run_dir: str, me: dict[str, Any]) -> None:
        self.lost = ""  # the reason, once the lease is lost
        self.url = storage.join(run_dir, _HOLDER)
        self._run_dir, self._me = run_dir, me
        self._stop, self._losing = threading.Event(), threading.Lock()
        self._renewed_at = 0.0  # by `clock`: when the last successful renewal began
        self._problem = "no answer"

    def acquire(self) -> None:
        """Take the lease. Raises LockedError when another process holds it, or the store ignores conditions."""
        fence.unguard_writes(self._run_dir)
        self._renewed_at = clock()
        holder, tag = self._read()
        if tag is not None:
            if wall_clock() - float(holder.get("beat", 0)) < LEASE_S:
                raise LockedError(_refusal(self._run_dir, holder))
            # a live holder with another clock renews meanwhile, so that our write on this version fails
            print(f"{self._run_dir}: {_name(holder)} has not renewed its lock; taking it over in {1.5 * BEAT_S:.0f} s")
            sleep(1.5 * BEAT_S)
            self._renewed_at = clock()
        if not self._write(tag):
            raise LockedError(_refusal(self._run_dir, self._read()[0]))
        self._require_conditions()

    def _require_conditions(self) -> None:
        """Raise LockedError when the store writes although a condition does not hold, as then two starters would both succeed."""
        content = storage.read_bytes(self.url)
        for tag in (None, _NO_VERSION):
            try:
                storage.write_if(self.url, content, tag)
            except storage.ChangedError:
                continue
            self._release()
            name = "If-None-Match" if tag is None else "If-Match"
            raise LockedError(
                f"{self._run_dir}: this store ignores conditional writes ({name}), so two commands could write at once; "
                "give a run_dir= in a store that honors them (AWS S3), or in a folder that all nodes share. Shards may stay there"
            )

    @contextmanager
    def renewed_in_the_background(self) -> Iterator[None]:
        """Renew the lease while the block runs, then release it."""
        threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(BEAT_S)  # a hanging renewal does no harm: its version will be gone
            with suppress(storage.StorageError):  # then the lease lapses
                self._release()

    def _release(self) -> None:
        if not self.lost and self._read()[0].get("token") == self._me["token"]:
            storage.remove(self.url)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S) and not self.lost:
            self.renew()

    def renew(self) -> None:
        """Rewrite the lease, or lose it when another process has it."""
        began = clock()
        try:
            holder, tag = self._read()
            if (tag is None or holder.get("token") == self._me["token"]) and self._write(tag):
                self._renewed_at = began
            else:
                self._lose(f"{_name(self._read()[0])} has taken it over")
        except storage.StorageError as error:  # the next beat tries again, until `why_lost` says it is too late
            self._problem = str(error)

    def _watch(self) -> None:
        """End the lease by the clock, as a renewal may hang."""
        while not self._stop.wait(LEASE_S / 60) and not self.why_lost():
            pass

    def why_lost(self) -> str:
        """Why this process may not write any more; empty while it may. Called before every write, so that the clock decides, not the
        threads."""
        if not self.lost and clock() - self._renewed_at > LEASE_S:
            self._lose(f"it could not be renewed for {LEASE_S:.0f} s ({self._problem})")
        return self.lost

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost:
                return
            self.lost = f"{self._run_dir}: this process lost its lock and stopped: {reason}. The same command continues"
        interrupt.abandon()

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """The holder and the version of the lease; ({}, None) when there is no lease."""
        try:
            content, tag = storage.read_version(self.url)
        except FileNotFoundError:
            return {}, None
        return _parse(content), tag

    def _write(self, tag: str | None) -> bool:
        """Replace the version `tag` of the lease by ours. Returns False when another version is there."""
        content = json.dumps(self._me | {"beat": wall_clock()}) + "\n"
        try:
            storage.write_if(self.url, content.encode(), tag)
        except storage.ChangedError:  # perhaps by our own write, whose answer was lost
            return self._read()[0].get("token") == self._me["token"]
        except storage.ConditionError as error:
            raise LockedError(
                f"run_dir={redacted(self._run_dir)}: {error}; give s3://… or a folder that all nodes share"
            ) from None
        return True


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return parse_json(content, _HOLDER, "", _Holder)
    except DataError:  # damaged: held by nobody
        return {}


class _Holder(BaseModel):
    """The fields of the lock file; each may be missing."""

    pid: int | None = None
    host: str | None = None
    command: str | None = None
    beat: float = 0.0
    token: str | None = None


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')} ({holder.get('command', 'unknown command')})"


def _refusal(run_dir: str, holder: dict[str, Any]) -> str:
    return f"{run_dir} is in use by {_name(holder)}; wait for it to end, or choose another run_dir="
