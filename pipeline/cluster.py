"""Starting Ray, once per command."""

from __future__ import annotations

import logging
import os
import signal
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError, RayTaskError

_show = getattr(ray_worker, "print_to_stdstream", None)


def start_ray(address: str | None) -> None:
    """Connect to the cluster at `address`, or start Ray on this machine; nothing happens when it runs already."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in Ray Train's workers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # the behaviour to come; else ray warns at every start
    if _show is not None:
        ray_worker.print_to_stdstream = _show_in_short
    with _own_sigterm():
        if address:
            context = ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
            if context.dashboard_url:
                print(f"Ray's dashboard: http://{context.dashboard_url}")
        else:
            ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)


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
