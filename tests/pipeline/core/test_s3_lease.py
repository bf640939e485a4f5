"""One writer on a run directory in an object store: a lease that lapses with its holder, and stops a holder that lost it.

The clocks are the tests' own: nothing here depends on how busy the machine is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from data import storage
from data.storage import FencedError, StorageError, fence, remote, retry
from pipeline.core import interrupt, lock
from pipeline.core.lock import LEASE_S, Lease, LockedError, run_lock
from tests import HANGS_S
from tests.s3_server import FaultyS3, hold_lease, put, try_to_write


class Clocks:
    """Stands in for both clocks of `lock`; sleeping is moving them on."""

    now = 1_700_000_000.0

    def __init__(self) -> None:
        self.while_asleep: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.while_asleep()


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(lock, "clock", clocks)
    monkeypatch.setattr(lock, "wall_clock", clocks)
    monkeypatch.setattr(lock, "sleep", clocks.sleep)
    return clocks


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """How often the main thread was told to end."""
    calls: list[bool] = []
    monkeypatch.setattr(interrupt, "abandon", lambda: calls.append(True))
    return calls


@pytest.fixture(autouse=True)
def unguarded(folder: str, ctrl_c: None) -> Iterator[None]:
    yield
    fence.unguard_writes(folder)


def lease_of(folder: str, command: str) -> Lease:
    return Lease(folder, {"host": "host", "pid": 1, "command": command, "token": command})


def holder(folder: str) -> Any:
    return json.loads(storage.read_text(f"{folder}/lock.json"))


def test_a_second_driver_is_refused_and_a_dead_ones_lease_lapses(s3: FaultyS3, folder: str, clocks: Clocks) -> None:
    first, second = lease_of(folder, "first"), lease_of(folder, "second")
    first.acquire()
    for _ in range(5):
        clocks.now += 0.9 * LEASE_S
        first.renew()
        with pytest.raises(LockedError, match=r"process 1 on host \(first\)"):
            second.acquire()
    clocks.now += LEASE_S
    second.acquire()
    assert holder(folder)["command"] == "second"


def test_a_driver_in_another_process_is_named_and_its_lease_taken_over_after_its_death(
    s3: FaultyS3, folder: str, clocks: Clocks
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold_lease, args=(folder,))
    process.start()
    try:
        deadline = time.monotonic() + HANGS_S
        while not storage.exists(f"{folder}/lock.json"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        clocks.now = time.time()
        with pytest.raises(LockedError, match=rf"process {process.pid} on .*the first command"), run_lock(folder, "x"):
            pass
    finally:
        process.kill()
        process.join()
    clocks.now = time.time() + LEASE_S
    with run_lock(folder, "the second command"):
        assert holder(folder)["command"] == "the second command"
    assert not storage.exists(f"{folder}/lock.json")


def test_a_holder_whose_clock_is_behind_keeps_its_lease(s3: FaultyS3, folder: str, clocks: Clocks) -> None:
    url = f"{folder}/lock.json"
    put(url, json.dumps({"command": "behind", "beat": clocks.now - 1000}).encode())
    clocks.while_asleep = lambda: put(url, json.dumps({"command": "behind", "beat": clocks.now - 999}).encode())
    with pytest.raises(LockedError, match="behind"), run_lock(folder, "second"):
        pass


@pytest.mark.parametrize("lapsed", [False, True])
def test_of_starters_at_once_one_has_the_lease(s3: FaultyS3, folder: str, clocks: Clocks, lapsed: bool) -> None:
    if lapsed:
        lease_of(folder, "dead").acquire()
        clocks.now += LEASE_S
    leases = [lease_of(folder, f"command {number}") for number in range(4)]
    outcomes: list[Lease] = []
    barrier = threading.Barrier(len(leases))
    clocks.while_asleep = barrier.wait if lapsed else lambda: None

    def start(lease: Lease) -> None:
        if not lapsed:
            barrier.wait()
        try:
            lease.acquire()
        except LockedError:
            return
        outcomes.append(lease)

    threads = [threading.Thread(target=start, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 1
    assert holder(folder)["command"] in {f"command {number}" for number in range(4)}


def test_our_own_write_whose_answer_was_lost_is_no_other_driver(s3: FaultyS3, folder: str, clocks: Clocks) -> None:
    fault = s3.add("lost answer", "PUT", "lock.json", times=2)
    with run_lock(folder, "first"):
        assert fault.done == 2


def test_a_lease_taken_over_is_lost(s3: FaultyS3, folder: str, clocks: Clocks, abandoned: list[bool]) -> None:
    first, second = lease_of(folder, "first"), lease_of(folder, "second")
    first.acquire()
    clocks.now += LEASE_S
    second.acquire()
    first.renew()
    first.renew()
    assert "lost its lock and stopped: process 1 on host (second) has taken it over" in first.lost
    assert abandoned == [True]
    assert holder(folder)["command"] == "second"
    second.renew()
    assert not second.lost


def test_a_lease_that_cannot_be_renewed_is_lost_by_the_clock(
    s3: FaultyS3, folder: str, clocks: Clocks, abandoned: list[bool]
) -> None:
    lease = lease_of(folder, "first")
    lease.acquire()
    fault = s3.add("503", "PUT", "lock.json", times=10_000)
    for _ in range(3):
        clocks.now += LEASE_S / 3
        lease.renew()
        assert not lease.why_lost()
    assert fault.done == 3 * retry.TRIES  # it kept trying
    clocks.now += 0.1
    assert "could not be renewed for 60 s (" in lease.why_lost()
    assert "503 SlowDown" in lease.lost
    assert abandoned == [True]


def test_a_lease_survives_a_renewal_that_fails(s3: FaultyS3, folder: str, clocks: Clocks) -> None:
    lease = lease_of(folder, "first")
    lease.acquire()
    fault = s3.add("503", "PUT", "lock.json", times=retry.TRIES)
    for _ in range(9):
        clocks.now += LEASE_S / 3
        lease.renew()
        assert not lease.why_lost()
    assert fault.done == retry.TRIES


def test_a_run_whose_lease_is_taken_over_stops_and_writes_nothing_more(
    s3: FaultyS3, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)

    def run() -> None:
        with run_lock(folder, "first"):
            put(f"{folder}/lock.json", json.dumps({"command": "second", "token": "other"}).encode())
            deadline = time.monotonic() + HANGS_S
            try:
                while time.monotonic() < deadline:
                    time.sleep(0.05)
            finally:
                with pytest.raises(FencedError, match="lost its lock"):
                    put(f"{folder}/late.bin", b"late")

    with pytest.raises(LockedError, match=r"lost its lock and stopped: .*\(second\) has taken it over"):
        run()
    with pytest.raises(FencedError, match="lost its lock"):  # of a thread that is not done yet
        put(f"{folder}/later.bin", b"late")
    assert holder(folder)["command"] == "second"
    assert storage.list_names(folder) == ["lock.json"]
    fence.unguard_writes(folder)
    storage.remove(f"{folder}/lock.json")
    with run_lock(folder, "third"):
        put(f"{folder}/x.bin", b"x")


def test_a_write_asks_the_clock_itself(s3: FaultyS3, folder: str, clocks: Clocks, abandoned: list[bool]) -> None:
    """Whatever the threads that renew and watch do: the machine may have slept."""
    with pytest.raises(LockedError, match="could not be renewed"), run_lock(folder, "first"):  # noqa: PT012
        put(f"{folder}/x.bin", b"x")
        clocks.now += LEASE_S + 1
        put(f"{folder}/y.bin", b"y")
    assert "y.bin" not in storage.list_names(folder)
    assert abandoned == [True]


# workers: processes that a driver starts, here or on other machines


@pytest.mark.slow
def test_workers_write_as_long_as_the_lease_is_their_drivers(
    s3: FaultyS3, folder: str, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 3600.0)  # a renewal would find the other token, and stop this process
    with run_lock(folder, "first"):
        variable = os.environ[fence.FENCE_VARIABLE]
        assert try_to_write(f"{folder}/x.bin") == "written"
        assert worker(variable, f"{folder}/a.bin", folder) == "written"
        put(f"{folder}/lock.json", json.dumps({"command": "second", "token": "other"}).encode())
        assert "lost its lock there" in worker(variable, f"{folder}/b.bin", folder)
        assert worker(variable, f"{folder}-elsewhere/c.bin", folder) == "written"
        storage.remove(f"{folder}/lock.json")
        assert "lost its lock there" in worker(variable, f"{folder}/d.bin", folder)
        s3.add("503", "GET", "lock.json", times=1000)
        assert "503" in worker(variable, f"{folder}/e.bin", folder)
        s3.faults.clear()
    assert fence.FENCE_VARIABLE not in os.environ
    names = set(storage.list_names(folder))
    assert {"a.bin", "x.bin"} <= names
    assert not {"b.bin", "d.bin", "e.bin"} & names


def worker(variable: str, url: str, folder: str) -> str:
    """What a process says that inherits the variable, of a write."""
    code = (
        "from data.storage import retry; retry.FIRST_WAIT_S = 0.01\n"
        f"from tests.s3_server import try_to_write; print(try_to_write({url!r}))"
    )
    environment = os.environ | {fence.FENCE_VARIABLE: variable}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# stores that ignore conditional writes


def test_a_store_without_conditions_is_refused(folder: str) -> None:
    """As fsspec's own local file system, under a name that is not ours."""
    with (
        pytest.raises(
            LockedError,
            match=r"run_dir=local://.*only s3:// has conditional writes.*give s3://… or a folder that all nodes share",
        ),
        run_lock("local:///tmp/nothing-there/run", "first"),
    ):
        pass


@pytest.mark.parametrize("ignored", ["IfNoneMatch", "IfMatch"])
def test_a_store_that_ignores_conditions_is_refused(
    s3: FaultyS3, folder: str, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, ignored: str
) -> None:
    fs, _ = remote.filesystem(folder)
    write = fs.pipe_file

    def forgetful(path: str, data: bytes, **options: Any) -> Any:
        return write(path, data, **{name: value for name, value in options.items() if name != ignored})

    monkeypatch.setattr(fs, "pipe_file", forgetful)
    with pytest.raises(LockedError, match="ignores conditional writes"), run_lock(folder, "first"):
        pass
    assert not storage.exists(f"{folder}/lock.json")


def test_an_error_of_the_store_is_not_taken_for_a_condition(s3: FaultyS3, folder: str, clocks: Clocks) -> None:
    s3.add("403", "PUT", "lock.json", times=1)
    with pytest.raises(StorageError, match="refused: 403"), run_lock(folder, "first"):
        pass
