"""Batches from loading processes; what happens when such a process is lost, hangs, or finds no shared memory.

A batch is sent in shared memory (/dev/shm), of which containers have 64 MB by default: a large one in pieces (`inputs.pieces`), so
that all in flight fit. When it is full all the same, torch loses the batch and the trainer waits forever. So such a batch or piece
is sent through a pipe, as bytes: the same pixels, more copies.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.noise import Noise
from pipeline.inputs.pieces import AHEAD, MAX_SHARED, Joiner, num_pieces, shared_memory_needed
from pipeline.inputs.targets import SparseTargets

SILENT_S = 600  # after which a loading process counts as hanging
_SHARED = "/dev/shm"
_MAX_SHARE = 0.8  # of the shared memory that there is; the rest is for others
_processes: set[BaseProcess] = set()  # the loading processes of the one training that runs in this process


@dataclass
class _PipedBatch:
    """A batch or piece as arrays, which are sent as bytes, not in shared memory."""

    images: np.ndarray
    targets: SparseTargets | None
    noise: list[Noise] | None
    positions: np.ndarray | None

    def batch(self) -> TrainBatch:
        """The batch as tensors, without a copy."""
        return TrainBatch(torch.from_numpy(self.images), self.targets, self.noise, self.positions)

    def pin_memory(self) -> _PipedBatch:
        """Called by torch's loader, before a copy to a GPU. Leave it unpinned: only the copy takes longer."""
        return self


class _BatchesOrErrors(Dataset[TrainBatch | _PipedBatch | Exception]):
    """Batches in pieces, by (step, piece); or the error of one as a value: raised, torch would put the loading process's traceback
    into its message."""

    def __init__(self, batches: TrainBatches, steps: range, pieces: int, shared: bool) -> None:
        self._batches, self._steps, self._pieces, self._shared = batches, steps, pieces, shared

    def __getitem__(self, index: tuple[int, int]) -> TrainBatch | _PipedBatch | Exception:
        step, number = index
        self._batches.expect(self._asked_for(step, number))
        try:
            batch = self._batches[step] if self._pieces == 1 else self._batches.piece(step, number, self._pieces)
        except (ValueError, OSError) as error:  # the user's or the machine's; others are bugs and keep their traceback
            return error
        return _to_shared_memory(batch) if self._shared else batch

    def _asked_for(self, step: int, number: int) -> Iterator[tuple[int, int, int]]:
        """This piece and those that this process is asked for after it: torch deals them out in turn."""
        process = get_worker_info()
        first, all_pieces = self._steps.index(step) * self._pieces + number, len(self._steps) * self._pieces
        for piece in range(first, all_pieces, process.num_workers if process else 1):
            yield self._steps[piece // self._pieces], piece % self._pieces, self._pieces


def _to_shared_memory(batch: TrainBatch) -> TrainBatch | _PipedBatch:
    """Move a batch to shared memory, or make it one for the pipe if that is full, or too many files are open.

    Torch would move it when sending, in a thread whose errors are lost, and the batch with them.
    """
    try:
        batch.images.share_memory_()
    except RuntimeError:
        return _PipedBatch(batch.images.numpy(), batch.targets, batch.noise, batch.positions)
    return batch


def load_batches(
    batches: TrainBatches, steps: range, num_workers: int, pin: bool, name: str = ""
) -> Generator[TrainBatch, None, None]:
    """Yield the batches of `steps` in order, loaded ahead by `num_workers` processes (0: in this one).

    Args:
        pin: copy batches to pinned memory, for a GPU.
        name: section of the configuration, for messages.

    Raises:
        DataError: as `TrainBatches`.
        RuntimeError: a loading process was lost or hangs; call inside `raise_on_lost_loaders`.
    """
    pieces = _num_pieces(batches, num_workers)
    joiner = Joiner(pieces, batches.num_images, pin)
    before = set(multiprocessing.active_children())
    with _signals_blocked() if num_workers else nullcontext():
        items = iter(_loader(batches, steps, pieces, num_workers, pin))
    _processes.update(set(multiprocessing.active_children()) - before)
    reported = lost = False
    try:
        while isinstance(item := _next(items), TrainBatch | _PipedBatch):
            if isinstance(item, _PipedBatch):
                if not reported:
                    _report_pipes(name, item, num_workers)
                reported = True
                item = item.batch()
            yield from joiner.add(item)
    except RuntimeError:
        lost = True  # the error holds torch's loader; `raise_on_lost_loaders` ends the processes when it is gone
        raise
    finally:
        del items
        if not lost:
            _end_processes()
    if isinstance(item, Exception):
        raise item


def _num_pieces(batches: TrainBatches, num_workers: int) -> int:
    """Pieces of a batch, by the shared memory that there is for each training process, all of which may be on this machine."""
    if not num_workers:
        return 1
    most = MAX_SHARED
    with suppress(OSError):  # a system without /dev/shm
        room = shutil.disk_usage(_SHARED)
        most = min(most, int(_MAX_SHARE * min(room.free, room.total / batches.world_size)))
    return num_pieces(batches.num_images, batches.image_bytes, num_workers, most)


def _loader(
    batches: TrainBatches, steps: range, pieces: int, num_workers: int, pin: bool
) -> DataLoader[TrainBatch | _PipedBatch | Exception]:
    # Forking while connected to Ray drops the handles of actors that other threads hold, in the middle of the parent's own messages,
    # and the parent's next actor never answers. So spawn.
    spawns = num_workers > 0 and _uses_ray()
    return DataLoader(
        _BatchesOrErrors(batches, steps, pieces, shared=num_workers > 0),
        batch_size=None,
        sampler=((step, number) for step in steps for number in range(pieces)),
        num_workers=num_workers,
        worker_init_fn=_init_loader_worker,
        prefetch_factor=AHEAD if num_workers else None,
        pin_memory=pin,
        timeout=SILENT_S if num_workers else 0,
        multiprocessing_context="spawn" if spawns else None,
    )


def _uses_ray() -> bool:
    """Whether this process is connected to Ray, which training in one process does not import."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _report_pipes(name: str, batch: _PipedBatch, num_workers: int) -> None:
    """Print that there is too little shared memory, how much is needed, and where to change it."""
    needed = shared_memory_needed(batch.images.nbytes, num_workers)
    have = shutil.disk_usage(_SHARED).total
    print(
        f"{name}: shared memory ({_SHARED}, {_megabytes(have)}) has too little room for the images in flight: {_megabytes(needed)}. "
        f"Some go through pipes, which is slower; start the container with --shm-size={_megabytes(2 * needed).replace(' MB', 'm')}, or "
        f"give a lower {name}.loader_workers={num_workers}",
        flush=True,
    )


def _megabytes(count: int) -> str:
    return f"{-(-count // 1_000_000)} MB"


def _next(items: Iterator[TrainBatch | _PipedBatch | Exception]) -> TrainBatch | _PipedBatch | Exception | None:
    """The next item; None at the end. Raise the loss of a process; return that one hangs, to be raised after all are killed."""
    try:
        return next(items, None)
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        # a killed process had announced a batch, which cannot be fetched any more
        raise RuntimeError(f"DataLoader worker does not answer any more ({type(error).__name__})") from None
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        return RuntimeError(f"DataLoader worker is silent: no batch for {SILENT_S} seconds")


def _end_processes() -> None:
    """Kill the loading processes, after their loader is gone. This process's exit would wait for one that hangs and ignores SIGTERM."""
    while _processes:
        process = _processes.pop()
        if process.is_alive():
            process.kill()
        process.join()


class LoaderLostError(ValueError):
    """A loading process was killed, or hangs."""


def raise_on_lost_loaders(name: str, train: Callable[[], None]) -> None:
    """Call `train`. Torch may report a lost loading process at any moment, as a RuntimeError: raise a LoaderLostError instead."""
    try:
        return train()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        lost = str(error).strip()
    # Outside `except`: torch's error holds its loader, which would report the loss again, wherever this process is by then.
    _end_processes()
    raise LoaderLostError(f"{name}: {_why_lost(name, lost)}. The same command continues from the last checkpoint")


def _why_lost(name: str, lost: str) -> str:
    if "is silent" in lost:
        return (
            f"a loading process hangs ({lost}); check that the shards can be read and that memory is left; if they are only slow, give "
            f"more {name}.loader_workers or a smaller {name}.batch_size"
        )
    return f"a loading process was lost ({lost}); if memory ran out, give a lower {name}.loader_workers"


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM in processes started inside, which these signals would end before `_init_loader_worker`."""
    resource_tracker.ensure_running()  # starts with the first spawned process, and would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_loader_worker(worker: int) -> None:  # noqa: ARG001 (torch's interface)
    """Ignore signals to the process group, so that the trainer can save first. One thread per process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
