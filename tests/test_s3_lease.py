"""One writer on a run directory in an object store: a lease that lapses with its holder, and stops a holder that lost it."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from data import retry, storage
from data.storage import StorageError
from pipeline import lock
from pipeline.lock import LockedError, run_lock
from tests.s3_server import FaultyS3, hold_lease, put


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lock, "LEASE_S", 3.0)
    monkeypatch.setattr(lock, "BEAT_S", 0.3)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, handler)


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while not storage.exists(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_driver_is_refused_and_a_dead_ones_lease_lapses(s3: FaultyS3, folder: str, short_lease: None) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold_lease, args=(folder, lock.LEASE_S, lock.BEAT_S))
    process.start()
    try:
        wait_for(f"{folder}/lock.json")
        time.sleep(1.3 * lock.LEASE_S)  # it is renewed
        with (
            pytest.raises(LockedError, match=rf"process {process.pid} on .*the first command"),
            run_lock(folder, "x"),
        ):
            pass
    finally:
        process.kill()
        process.join()
    time.sleep(lock.LEASE_S)
    with run_lock(folder, "the second command"):
        assert json.loads(storage.read_text(f"{folder}/lock.json"))["command"] == "the second command"
    assert not storage.exists(f"{folder}/lock.json")


def test_a_holder_whose_clock_is_behind_keeps_its_lease(s3: FaultyS3, folder: str, short_lease: None) -> None:
    url = f"{folder}/lock.json"
    put(url, json.dumps({"command": "behind", "beat": time.time() - 1000}).encode())
    timer = threading.Timer(0.1, put, (url, json.dumps({"command": "behind", "beat": time.time() - 999}).encode()))
    timer.start()
    with pytest.raises(LockedError, match="behind"), run_lock(folder, "second"):
        pass
    timer.join()


def test_of_two_starters_at_once_one_is_refused(s3: FaultyS3, folder: str, short_lease: None) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(2)

    def start() -> None:
        barrier.wait()
        try:
            with run_lock(folder, "x"):
                time.sleep(1)
            outcomes.append("ran")
        except LockedError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ran", "refused"]


def test_our_own_write_whose_answer_was_lost_is_no_other_driver(s3: FaultyS3, folder: str, short_lease: None) -> None:
    fault = s3.add("lost answer", "PUT", "lock.json", times=2)
    with run_lock(folder, "first"):
        assert fault.done == 2


def run_until_stopped(folder: str, taken_over: bool = False) -> None:
    with run_lock(folder, "first"):
        if taken_over:
            put(f"{folder}/lock.json", json.dumps({"command": "second", "token": "other"}).encode())
        deadline = time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            with pytest.raises(StorageError, match="lost its lock"):
                put(f"{folder}/late.bin", b"late")
    raise AssertionError("never stopped")


def test_a_lease_taken_over_stops_the_run_and_its_writes(s3: FaultyS3, folder: str, short_lease: None) -> None:
    with pytest.raises(LockedError, match=r"lost its lock and stopped: .*\(second\) has taken it over"):
        run_until_stopped(folder, taken_over=True)
    assert json.loads(storage.read_text(f"{folder}/lock.json"))["command"] == "second"
    assert not storage.exists(f"{folder}/late.bin")
    put(f"{folder}/late.bin", b"late")


def test_a_lease_that_cannot_be_renewed_stops_the_run(s3: FaultyS3, folder: str, short_lease: None) -> None:
    fault = s3.add("503", "PUT", "lock.json", times=10_000, skip=2)
    started = time.monotonic()
    with pytest.raises(LockedError, match=r"could not be renewed for 3 s \(.*503 SlowDown"):
        run_until_stopped(folder)
    assert 3 < time.monotonic() - started < 15
    assert fault.done > retry.TRIES  # it kept trying


def test_a_lease_survives_a_renewal_that_fails(s3: FaultyS3, folder: str, short_lease: None) -> None:
    fault = s3.add("503", "PUT", "lock.json", times=retry.TRIES + 2, skip=1)
    with run_lock(folder, "first"):
        time.sleep(1.3 * lock.LEASE_S)
        assert fault.done == retry.TRIES + 2
        put(f"{folder}/x.bin", b"x")
