"""Starting Ray: what it must not take away from the command that starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from data.settings import UsageError
from data.storage import FencedError
from data.storage.fence import FENCE_VARIABLE, workers_fenced
from pipeline.core import interrupt
from pipeline.core import ray_runtime as cluster
from pipeline.training import launch
from tests import HANGS_S

STOPPED_AS_RAY_CONNECTS = """
import os, signal, sys, time
from ray._private import worker
from pipeline.core import interrupt, ray_runtime

worker.listen_error_messages = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # Ray's own handlers are in place then
try:
    with interrupt.handled():
        ray_runtime.start_ray(None)
        time.sleep(30)
except interrupt.Interrupted as stop:
    time.sleep(4)  # Ray's handler has an alarm ring after 3 seconds, which aborts the process
    sys.exit(stop.exit_code)
"""


@pytest.mark.slow
@pytest.mark.alone
def test_sigterm_as_ray_connects_ends_the_command_as_sigterm() -> None:
    command = [sys.executable, "-c", STOPPED_AS_RAY_CONNECTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANGS_S)
    assert "SIGTERM received" in done.stderr  # by Ray's handler: this is the moment that is meant
    assert done.returncode == 143, done.stderr


def test_without_an_address_ray_starts_here_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.start_ray(None)
    assert [options["address"] for options in asked] == ["local"]
    assert capsys.readouterr().out.count("RAY_ADDRESS=10.0.0.1:6379 is not used") == 1


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:1", "1.2.3.4:99999"]
)
def test_a_cluster_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_TIMEOUT_S", 0.01)
    with pytest.raises(
        UsageError, match=r"^ray_address=.*: no Ray cluster answers there \(.+\); start one .*ray_address=null"
    ) as told:
        cluster.start_ray(address.format(port=unused_port()))
    assert "\n" not in str(told.value)


def test_what_listens_there_and_is_not_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_HEALTH_TIMEOUT_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UsageError, match="did not answer as Ray does"),
    ):
        cluster.start_ray(f"127.0.0.1:{silent.getsockname()[1]}")


def test_workers_on_a_cluster_are_given_the_fence_of_their_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_require_answer", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options) or SimpleNamespace(dashboard_url=""))  # type: ignore[func-returns-value]
    cluster.start_ray("head:6379")
    with workers_fenced("s3://bucket/run", "s3://bucket/run/lock.json", "token"):
        cluster.start_ray("head:6379")
        said = os.environ[FENCE_VARIABLE]
    assert "runtime_env" not in asked[0]
    assert asked[1]["runtime_env"] == {"env_vars": {FENCE_VARIABLE: said}}


@pytest.mark.parametrize("saves", [True, False])
def test_training_processes_save_after_a_signal_but_not_after_the_loss_of_the_run(
    monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    stopped: list[bool] = []
    monkeypatch.setattr(launch, "fit", lambda job, stop_requested: stopped.append(stop_requested()))
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: saves)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 1))
    link = SimpleNamespace(stop_requested=SimpleNamespace(remote=lambda: "reference"))
    with nullcontext() if saves else pytest.raises(FencedError, match="nothing is saved"):
        launch._fit_worker({"job": None, "link": link})
    assert stopped == [True] * saves


def test_abandoning_ends_the_main_thread_and_forbids_saving() -> None:
    with pytest.raises(interrupt.Interrupted), interrupt.handled():
        interrupt.abandon()
    assert not interrupt.may_save()
    with interrupt.handled():
        assert interrupt.may_save()


def test_a_start_that_takes_too_long_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its processes 30 seconds, which beside much other work are too few."""
    attempts: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        attempts.append(options)
        if len(attempts) % 5:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(cluster.ray, "init", start)
    cluster.start_ray(None)
    assert len(attempts) == 5
    monkeypatch.setattr(cluster, "_STARTS", 4)
    with pytest.raises(UsageError, match=r"did not start here in 4 attempts of 30 s.*the same command continues"):
        cluster.start_ray(None)


def test_another_error_of_a_start_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_: Any) -> None:
        raise RuntimeError("another")

    monkeypatch.setattr(cluster.ray, "init", start)
    with pytest.raises(RuntimeError, match="another"):
        cluster.start_ray(None)
