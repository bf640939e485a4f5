"""Start Ray, once per command, and translate its errors."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import ray
from ray._private import worker as ray_worker
from ray._private.node import Node
from ray.exceptions import RayError, RayTaskError

from data.settings import UsageError
from data.storage.fence import FENCE_VARIABLE

_CONNECT_TIMEOUT_S, _HEALTH_TIMEOUT_S = 8.0, 60.0  # until the port of a starting cluster opens; for Ray's health check
_STARTS = 5
_TICK_S = 5.0
Item = TypeVar("Item")
_show = getattr(ray_worker, "print_to_stdstream", None)


def start_ray(address: str | None) -> None:
    """Connect to the cluster at `address`; with None, start Ray on this machine and ignore RAY_ADDRESS. Do nothing when Ray runs.

    Raises UsageError when no cluster answers at `address`.
    """
    if ray.is_initialized():
        return
    if address:
        _require_answer(address)
    elif elsewhere := os.environ.get("RAY_ADDRESS"):
        print(f"ray_address=null starts Ray here; RAY_ADDRESS={elsewhere} is not used (ray_address={elsewhere} would)")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in Ray Train's workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; it warns without
    if _show is not None:
        ray_worker.print_to_stdstream = _show_in_short
    with _own_sigterm():
        if address:
            context = _connect(address)
            if context.dashboard_url:
                print(f"Ray's dashboard: http://{context.dashboard_url}")
        else:
            _start_here()


def _start_here() -> None:
    """Start Ray on this machine, in several attempts: its processes have 30 seconds, which are too few beside much other work."""
    for _ in range(_STARTS):
        try:
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
            return
        except Exception as error:  # of no other class
            if "timed out during startup" not in str(error):
                raise
            _end_processes(error)
    raise UsageError(
        f"Ray did not start here in {_STARTS} attempts of 30 s, so this machine is busy, or short of memory; the same command continues"
    )


def _end_processes(error: Exception) -> None:
    """End the processes of a node whose start failed with `error`; Ray would leave them running."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _connect(address: str) -> Any:
    """Pass the lease's fence to workers on other nodes, too; workers on this one inherit it."""
    fence = {name: os.environ[name] for name in (FENCE_VARIABLE,) if name in os.environ}
    options: dict[str, Any] = {"runtime_env": {"env_vars": fence}} if fence else {}
    try:
        return ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, first_line(error)) from None


def _require_answer(address: str) -> None:
    """Check the port and then Ray's health, because `ray.init` would try for minutes and log each attempt."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # `auto`, or another name that only Ray understands
    started = time.monotonic()
    while (reason := _connection_error(host.strip("[]"), int(port))) is not None:
        if time.monotonic() - started > _CONNECT_TIMEOUT_S:
            raise _no_cluster(address, reason)
        time.sleep(0.5)
    if not address.startswith("ray://"):
        _require_health(address)


def _connection_error(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        return str(error)
    return None


def _require_health(address: str) -> None:
    """Run Ray's health check in another process: if the port is not Ray's, its client waits forever."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_HEALTH_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _no_cluster(
            address, f"what listens there did not answer as Ray does for {_HEALTH_TIMEOUT_S:.0f} s"
        ) from None
    if done.returncode and "No such command" not in done.stderr:  # a private command, which Ray may drop
        raise _no_cluster(address, (done.stderr.strip() or "its health check failed").splitlines()[-1])


def _no_cluster(address: str, reason: str) -> UsageError:
    return UsageError(
        f"ray_address={address}: no Ray cluster answers there ({reason}); start one (ray start --head), correct the address, or give "
        "ray_address=null, which starts Ray here"
    )


def num_cpus() -> int:
    """Number of CPUs in Ray's cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def cores_and_gpus_here() -> tuple[int, int]:
    """CPUs and GPUs of the node that this process runs on, as Ray counts them."""
    here = ray.get_runtime_context().get_node_id()
    resources: dict[str, float] = next((node["Resources"] for node in ray.nodes() if node["NodeID"] == here), {})
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))


def as_finished(
    tasks: Iterable[tuple[Any, Item]], max_running: int | None = None, tick: Callable[[], object] = lambda: None
) -> Iterator[tuple[Item, Any]]:
    """Yield (item, result) as Ray tasks end, from (reference, item). Ray retries a task whose worker dies, three times.

    A task's error is raised, see `user_error`. The other tasks are not cancelled then, and end with this process at the latest:
    cancelling a task at the moment it ends crashes this process (Ray 2.60, "Tried to complete task that was not pending").

    Args:
        tasks: started when taken from here, at most `max_running` at once; None: all.
        tick: called after each task that ended, and every five seconds.
    """
    waiting = iter(tasks)
    pending = dict(islice(waiting, max_running))
    try:
        while pending:
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=_TICK_S, fetch_local=False)
            for reference in ended:
                yield pending.pop(reference), ray.get(reference)
                pending.update(islice(waiting, 1))
            tick()
    except RayError as error:
        raise user_error(error) from None


def user_error(error: RayError) -> Exception:
    """The error to raise for a failed task: a ValueError or OSError as the task raised it; of a bug, Ray's error with the traceback; of
    a worker that died repeatedly (no memory, node gone), an OSError that says so."""
    if not isinstance(error, RayTaskError):
        return OSError(
            f"a Ray task was lost ({first_line(error)}); with more memory or fewer tasks at once, the same command continues"
        )
    return error.cause if isinstance(error.cause, ValueError | OSError) else error


def first_line(error: object) -> str:
    """The first line of an error, as Ray's messages go on for paragraphs."""
    return str(error).strip().partition("\n")[0]


def _show_in_short(data: dict[str, Any], *args: Any, **options: Any) -> None:
    """Print only the first line of each of Ray's messages: for a dead node or worker it prints paragraphs that would bury our line."""
    lines = [textwrap.shorten(first_line(line), 160) for line in data.get("lines", ())]
    assert _show is not None, "_show_in_short replaces it"
    _show({**data, "lines": lines}, *args, **options)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's SIGTERM handler. `ray.init` installs one that exits silently, and for a moment one that prints a stack and
    aborts the process by an alarm three seconds later."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except BaseException as error:
        signal.alarm(0)
        if isinstance(error, SystemExit):  # Ray's handler took the signal
            signal.signal(signal.SIGTERM, handler)
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
