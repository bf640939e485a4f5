"""Between the driver of a training and its processes: a request to stop goes one way, printed text the other.

Ray does not pass on what processes print (`log_to_driver=False`): all ranks would print alike, each line with a process id before it.
"""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Stream = Literal["stdout", "stderr"]


class DriverLink:
    """An actor beside the driver; `start_link` starts it."""

    def __init__(self) -> None:
        self._requested, self._saves = asyncio.Event(), True
        self._texts: list[tuple[Stream, str]] = []

    async def request_stop(self, saves: bool) -> None:
        """Let every `stop_requested` return."""
        self._saves = saves
        self._requested.set()

    async def stop_requested(self) -> bool:
        """Wait for the request to stop; return whether to save the state."""
        await self._requested.wait()
        return self._saves

    async def print(self, stream: Stream, text: str) -> None:
        """Keep a text for the driver."""
        self._texts.append((stream, text))

    async def take_texts(self) -> list[tuple[Stream, str]]:
        """Return the texts that have come since the last call."""
        texts, self._texts = self._texts, []
        return texts


def start_link() -> Any:
    """Start a `DriverLink` on this node; return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(DriverLink).options(num_cpus=0, scheduling_strategy=here).remote()


def show_texts(link: Any) -> None:
    """Write what the training has printed to the driver's own streams."""
    for stream, text in ray.get(link.take_texts.remote()):
        target = sys.stdout if stream == "stdout" else sys.stderr
        target.write(text)
        target.flush()


@contextmanager
def printing_at_driver(link: Any) -> Iterator[None]:
    """Inside, what this process prints goes to the driver; on leaving, all of it is there."""
    stdout, stderr = _Forwarding(link, "stdout"), _Forwarding(link, "stderr")
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            yield
    finally:
        ray.wait([link.print.remote("stdout", "")])  # calls of one process arrive in order


class _Forwarding(io.TextIOBase):
    def __init__(self, link: Any, stream: Stream) -> None:
        self._link, self._stream = link, stream

    def write(self, text: str) -> int:
        self._link.print.remote(self._stream, text)
        return len(text)
