"""Batches on their way from the processes that load them, and what happens when one of these is lost, stuck or short of shared memory.

A batch travels in shared memory (/dev/shm), which containers have 64 MB of by default. Where it has no room left, torch loses the
batch and the trainer waits for ever; here such a batch goes through a pipe, as bytes: more copies, the same pixels.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

import numpy as np
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.inputs.batches import TrainBatch, TrainBatches
from pipeline.inputs.noise import Noise

SILENT_S = 600  # a batch that takes longer never comes
_AHEAD = 4  # batches that each process loads before they are asked for
_SHARED = "/dev/shm"
_processes: set[BaseProcess] = set()  # that load, of the one training that runs here


@dataclass
class _Piped:
    """A batch as arrays, which travel as bytes, and how many are in flight when all processes have loaded ahead."""

    images: np.ndarray
    targets: np.ndarray
    keys: list[str]
    noise: list[Noise] | None

    def batch(self) -> TrainBatch:
        """As tensors again, of the same memory."""
        return TrainBatch(torch.from_numpy(self.images), torch.from_numpy(self.targets), self.keys, self.noise)

    def pin_memory(self) -> _Piped:
        """Called in the loader's thread before the copy to a GPU; what comes through a pipe is not pinned, which costs time alone."""
        return self


class _Loaded(Dataset[TrainBatch | _Piped | Exception]):
    """TrainBatches, or what went wrong with one: torch would put a loading process's traceback into the message."""

    def __init__(self, batches: TrainBatches, travels: bool) -> None:
        self._batches, self._travels = batches, travels

    def __getitem__(self, step: int) -> TrainBatch | _Piped | Exception:
        try:
            batch = self._batches[step]
        except (ValueError, OSError) as error:  # of the user's or the machine's making
            return error
        return _to_shared_memory(batch) if self._travels else batch


def _to_shared_memory(batch: TrainBatch) -> TrainBatch | _Piped:
    """The batch where the trainer can see it. Done here and not when torch sends it, in a thread that cannot fail: without room, or
    with too many open files, the batch would be lost."""
    try:
        batch.images.share_memory_()
        batch.targets.share_memory_()
    except RuntimeError:
        return _Piped(batch.images.numpy(), batch.targets.numpy(), batch.keys, batch.noise)
    return batch


def load(
    batches: TrainBatches, steps: range, num_workers: int, pin: bool, name: str = ""
) -> Generator[TrainBatch, None, None]:
    """Batches of `steps` in order, loaded ahead by `num_workers` processes (0: in this one).

    These are forks, but not of a process that is connected to Ray: what its other threads know of actors ends in a fork, which
    tells Ray so in the middle of the parent's own messages, and the parent's next actor is waited for without end.

    Args:
        name: section of the configuration, for messages.

    Raises:
        DataError: as `TrainBatches`.
        RuntimeError: a loading process was lost or is silent; `tell_of_lost_loaders` makes it a sentence.
    """
    before = set(multiprocessing.active_children())
    with _signals_held_back() if num_workers else nullcontext():
        items = iter(_loader(batches, steps, num_workers, pin))
    _processes.update(set(multiprocessing.active_children()) - before)
    told = torn = False
    try:
        while isinstance(item := _next(items), TrainBatch | _Piped):
            if isinstance(item, _Piped):
                if not told:
                    _tell_of_pipes(name, item, num_workers)
                told = True
                yield item.batch()
            else:
                yield item
    except RuntimeError:
        torn = True  # torch's loader lives as long as its error; `tell_of_lost_loaders` ends the processes
        raise
    finally:
        del items
        if not torn:
            _end_processes()
    if isinstance(item, Exception):
        raise item


def _loader(
    batches: TrainBatches, steps: range, num_workers: int, pin: bool
) -> DataLoader[TrainBatch | _Piped | Exception]:
    spawns = num_workers > 0 and ray.is_initialized()
    return DataLoader(
        _Loaded(batches, travels=num_workers > 0),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        worker_init_fn=_init_loader_worker,
        prefetch_factor=_AHEAD if num_workers else None,
        pin_memory=pin,
        timeout=SILENT_S if num_workers else 0,
        multiprocessing_context="spawn" if spawns else None,
    )


def _tell_of_pipes(name: str, batch: _Piped, num_workers: int) -> None:
    """Say that there is too little shared memory, how much is needed and where to change it."""
    needed = shared_memory_needed(batch.images.nbytes + batch.targets.nbytes, num_workers)
    have = shutil.disk_usage(_SHARED).total
    print(
        f"{name}: shared memory ({_SHARED}, {_megabytes(have)}) is too small for the batches in flight ({_megabytes(needed)}), so some "
        f"go through pipes, which is slower; start the container with --shm-size={_megabytes(2 * needed).replace(' MB', 'm')}, or "
        f"give a lower {name}.loader_workers={num_workers} or {name}.batch_size",
        flush=True,
    )


def shared_memory_needed(batch_bytes: int, num_workers: int) -> int:
    """Bytes of the batches that `num_workers` processes load ahead, and of the one that is trained on."""
    return batch_bytes * (_AHEAD * num_workers + 1)


def _megabytes(count: int) -> str:
    return f"{-(-count // 1_000_000)} MB"


def _next(items: Iterator[TrainBatch | _Piped | Exception]) -> TrainBatch | _Piped | Exception | None:
    """None at the end. A process that was killed may have announced a batch that can't be fetched from it any more."""
    try:
        return next(items, None)
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        # as torch tells of a lost process
        raise RuntimeError(f"DataLoader worker does not answer any more ({type(error).__name__})") from None
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
        return RuntimeError(f"DataLoader worker is silent: no batch for {SILENT_S} seconds")


def _end_processes() -> None:
    """Once their loader is gone: a process that hangs ignores SIGTERM, and the end of this one would wait for it."""
    while _processes:
        process = _processes.pop()
        if process.is_alive():
            process.kill()
        process.join()


class LoaderLostError(ValueError):
    """A loading process was killed, or is silent."""


def tell_of_lost_loaders(name: str, train: Callable[[], None]) -> None:
    """Call `train`; the loss of a loading process, of which torch tells at any moment, becomes a LoaderLostError."""
    try:
        return train()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        lost = str(error).strip()
    # Only here: as long as torch's error is there, so is its loader, and it tells again wherever this process is by then.
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
def _signals_held_back() -> Iterator[None]:
    """Processes that are started here block SIGINT and SIGTERM, which would end them before `_init_loader_worker`."""
    resource_tracker.ensure_running()  # it comes with the first spawned process, and would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_loader_worker(worker: int) -> None:  # noqa: ARG001 (torch's interface)
    """Loader processes outlive a SIGTERM to the group, so that the trainer can save first; one thread each."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
