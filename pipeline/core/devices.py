"""Which device a run computes on, and calls on machines that have it: the driver itself needs no GPU.

Ray is imported, and started, only where the work has to go to another machine.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from typing import Any, TypeVar

from data.settings import UsageError

Result = TypeVar("Result")
UNKNOWN_DEVICE = "unknown"


def resolve_device(device: str, address: str | None) -> str:
    """`cpu` or `cuda`. `auto` is `cuda` if this machine has a GPU, or else the Ray cluster at `address`.

    Raises UsageError when no cluster answers there.
    """
    if device != "auto":
        return device
    return "cuda" if _has_gpu_here() or _has_cluster_gpus(address) else "cpu"


def known_device(device: str, address: str | None) -> str:
    """As `resolve_device`, or UNKNOWN_DEVICE where only a cluster could tell that does not answer. A command asks it once."""
    if device == "auto" and address and not _has_gpu_here() and not _cluster_answers(address):
        return UNKNOWN_DEVICE
    return resolve_device(device, address)


def require_device(device: str, address: str | None = None) -> None:
    """Raise UsageError for `cuda` where neither this machine nor the Ray cluster at `address` has a GPU."""
    if device != "cuda" or _has_gpu_here() or _has_cluster_gpus(address):
        return
    where = f"here, and the cluster at ray_address={address} has none now" if address else "here"
    raise UsageError(f"device=cuda: torch finds no GPU {where}; check the driver, or give device=cpu")


def is_elsewhere(device: str) -> bool:
    """Whether work for this device has to go to another machine."""
    return device == "cuda" and not _has_gpu_here()


def device_here(device: str) -> str:
    """A known device, or the CPU where only other machines have that, or nobody says."""
    return "cpu" if device == UNKNOWN_DEVICE or is_elsewhere(device) else device


def call_on_device(device: str, address: str | None, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function of a module: here, or in a Ray task on a machine with a GPU if this one has none.

    What a task prints is printed here when it ends. Ray starts it again, up to three times, if its process is lost.

    Raises:
        ValueError, OSError: as the function; an OSError also where the task was lost too often.
    """
    if not is_elsewhere(device):
        return function(*args)
    import ray

    from pipeline.core.ray_runtime import as_finished, start_ray

    start_ray(address)
    task: Any = ray.remote(num_cpus=1, num_gpus=1)(_call_and_capture)
    ((_, (result, printed)),) = as_finished([(task.remote(function, args), None)])
    print(printed, end="", flush=True)
    found: Result = result
    return found


def _call_and_capture(function: Callable[..., Result], args: Sequence[Any]) -> tuple[Result, str]:
    """What a function returns, and what it prints."""
    with redirect_stdout(io.StringIO()) as printed:
        result = function(*args)
    return result, printed.getvalue()


def _has_gpu_here() -> bool:
    import torch  # not at the top: selection does without its half gigabyte

    return torch.cuda.is_available()


@cache
def _cluster_answers(address: str) -> bool:
    from pipeline.core.ray_runtime import start_ray

    try:
        start_ray(address)
    except UsageError:
        return False
    return True


def _has_cluster_gpus(address: str | None) -> bool:
    if not address:
        return False
    import ray

    from pipeline.core.ray_runtime import start_ray

    start_ray(address)
    return bool(ray.cluster_resources().get("GPU", 0))
