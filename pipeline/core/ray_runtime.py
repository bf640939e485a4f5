"""Starting Ray, once per command."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError, RayTaskError

from data.settings import UsageError
from data.storage.fence import FENCE_VARIABLE

_STARTING_S, _HEALTH_S = 8.0, 60.0  # for the port of a cluster that is just starting, and for Ray's answer
_show = getattr(ray_worker, "print_to_stdstream", None)


def start_ray(address: str | None) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine, whatever RAY_ADDRESS says. Nothing happens when it runs.

    Raises:
        UsageError: no cluster answers at `address`.
    """
    if ray.is_initialized():
        return
    if address:
        _require_answer(address)
    elif elsewhere := os.environ.get("RAY_ADDRESS"):
        print(f"ray_address=null starts Ray here; RAY_ADDRESS={elsewhere} is not used (ray_address={elsewhere} would)")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in Ray Train's workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # the behaviour to come; else ray warns at every start
    if _show is not None:
        ray_worker.print_to_stdstream = _show_in_short
    with _own_sigterm():
        if address:
            context = _connect(address)
            if context.dashboard_url:
                print(f"Ray's dashboard: http://{context.dashboard_url}")
        else:
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)


def _connect(address: str) -> Any:
    """Workers on other nodes get what fences them from this process's lease; those on this one inherit it."""
    fence = {name: os.environ[name] for name in (FENCE_VARIABLE,) if name in os.environ}
    options: dict[str, Any] = {"runtime_env": {"env_vars": fence}} if fence else {}
    try:
        return ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, first_line(error)) from None


def _require_answer(address: str) -> None:
    """Ask before Ray does, which tries for minutes and logs each time: the port, and then whether that is Ray's."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # `auto`, or a name of Ray's own
    started = time.monotonic()
    while (reason := _connection_error(host.strip("[]"), int(port))) is not None:
        if time.monotonic() - started > _STARTING_S:
            raise _no_cluster(address, reason)
        time.sleep(0.5)
    if not address.startswith("ray://"):
        _require_health(address)


def _connection_error(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=_STARTING_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(error)
    return None


def _require_health(address: str) -> None:
    """In a process of its own: where something else listens, Ray's client waits without end."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_HEALTH_S, check=False)
    except subprocess.TimeoutExpired:
        raise _no_cluster(address, f"what listens there did not answer as Ray does for {_HEALTH_S:.0f} s") from None
    if done.returncode and "No such command" not in done.stderr:  # the command is none of Ray's public ones
        raise _no_cluster(address, (done.stderr.strip() or "its health check failed").splitlines()[-1])


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"ray_address={address}: no Ray cluster answers there ({reason}); start one (ray start --head), mend the address, or give "
        "ray_address=null, which starts Ray here"
    )


def num_cpus() -> int:
    """CPUs that Ray knows of, on all nodes; at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def user_error(error: RayError) -> Exception:
    """What to raise for a task that failed: a user's or the machine's error as it was, whose message is a sentence; of a bug, all
    that Ray tells; of a worker that Ray lost again and again (no memory, its node gone), a sentence."""
    if not isinstance(error, RayTaskError):
        return OSError(
            f"a Ray task was lost ({first_line(error)}); with more memory or fewer tasks at once, the same command continues"
        )
    return error.cause if isinstance(error.cause, ValueError | OSError) else error


def first_line(error: object) -> str:
    """Of what Ray says of an error, which goes on for paragraphs."""
    return str(error).strip().partition("\n")[0]


def _show_in_short(data: dict[str, Any], *args: Any, **options: Any) -> None:
    """Of a node that died Ray prints the last twenty lines of a log, of a worker a long paragraph, among which our one line would
    be lost; their beginning says it."""
    lines = [textwrap.shorten(first_line(line), 160) for line in data.get("lines", ())]
    assert _show is not None, "only called in its place"
    _show({**data, "lines": lines}, *args, **options)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler: `ray.init` puts one in its place that exits without a word, and for a moment one that prints a
    stack and has the process aborted by an alarm three seconds later."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except BaseException as error:
        signal.alarm(0)
        if isinstance(error, SystemExit):  # Ray's handler has had the signal already
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
