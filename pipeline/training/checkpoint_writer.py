"""Write checkpoints beside the training: a copy of the state, then a thread, one checkpoint at a time.

training    step N   copy   step N + 1   step N + 2   step N + 3   …
thread                      checkpoint N, durable ──► metrics up to N
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.job import TrainJob
from pipeline.training.metrics_log import write_events, write_lines
from pipeline.training.state import TrainState


class CheckpointWriter:
    """Saves the state of a training; a context manager, whose end waits for the checkpoint that is being written.

    Args:
        step: at which the training starts or continues.
    """

    def __init__(self, job: TrainJob, step: int) -> None:
        self._job = job
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._saved_at, self._saved_step = time.monotonic(), step

    def is_due(self) -> bool:
        """Whether `checkpoint_every_s` have passed since the last checkpoint was begun, and it is written.

        With 0, a checkpoint is due after every step, and `save` waits for the one before.
        """
        every_s = self._job.config.checkpoint_every_s
        has_room = self._pending is None or self._pending.done() or not every_s
        return has_room and time.monotonic() - self._saved_at >= every_s

    def save(self, state: TrainState) -> None:
        """Copy the state; a thread writes the checkpoint, and then the metrics up to it. Wait for the checkpoint before.

        Raises as `wait`, about the checkpoint before.
        """
        self.wait()
        copied = copy_to_host(state.as_checkpoint())
        self._pending = self._thread.submit(self._write, copied, self._saved_step)
        self._saved_at, self._saved_step = time.monotonic(), state.step

    def wait(self) -> None:
        """Wait until the last checkpoint and its metrics are durable. Raises OSError or StorageError when they could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def raise_on_error(self) -> None:
        """Raise as `wait`, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _write(self, copied: HostCopy, saved_step: int) -> None:
        job, content = self._job, copied.wait()
        save_checkpoint(job.checkpoints, content["step"], content, job.config.keep_checkpoints)
        write_lines(job.folder, content["metrics"], content["timing"])
        write_events(job.folder, content["metrics"], content["timing"], saved_step, content["step"])

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


@dataclass(frozen=True)
class HostCopy:
    """A copy of a checkpoint's content, maybe still coming from the GPU."""

    content: dict[str, Any]
    done: torch.cuda.Event | None

    def wait(self) -> dict[str, Any]:
        """The content, once it is there."""
        if self.done is not None:
            self.done.synchronize()
        return self.content


def copy_to_host(content: dict[str, Any]) -> HostCopy:
    """Copy tensors and plain values. torch.save writes the same bytes of the copy, from a CPU.

    From a GPU, tensors are copied to pinned memory, in its order of work: after the last step and before the next one. Does not wait
    for them.
    """
    on_gpu = [tensor for tensor in _tensors(content) if tensor.is_cuda]
    copies: dict[int, Any] = {id(tensor): _to_pinned(tensor) for tensor in on_gpu}
    done = torch.cuda.current_stream().record_event() if on_gpu else None
    return HostCopy(copy.deepcopy(content, copies), done)  # which replaces a tensor by its copy, if there is one


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
