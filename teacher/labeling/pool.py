"""A pool of Ray actors that work through shards.

Workers come and go: one that dies or hangs is replaced, and its shards go to others; new ones are started as the cluster finds
room, however long others take to get ready. An actor has `place()`, which answers at once with its node and process; `prepare()`, which
ends when it can label; `label(shard, url, careful)`, two of which may run at once (careful: workers were lost at this shard); and
`progress()`, which answers while they do.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data.labels.label_files import LabeledShard
from data.shards.split import Shard
from pipeline.core import interrupt
from pipeline.core.ray_runtime import first_line, user_error
from pipeline.core.stage import StageError, WorkerError

_ATTEMPTS = 7  # at a shard, alone on a worker; workers may be preempted, but a shard that kills them all is named
_CAREFUL_FROM = 5  # such attempts; care takes time, in which a worker may be preempted
_STARTS = 3  # workers in a row that are lost before they are ready
_PLACING_S = 60.0  # after which a worker that does not say where it is keeps no other from being started
_TICK_S = 0.5  # so that a signal is noticed
_PROGRESS_S = 1.0
_NOTICE_S = 60.0
_IN_FLIGHT = 2  # shards on a worker: the second is read while the first one ends


@dataclass(frozen=True)
class PoolOptions:
    """How many workers, and when to lose patience.

    Attributes:
        min_workers: asked of Ray at once; those it has no room for wait for it.
        max_workers: more are started only where the cluster has room.
        resources: of one worker, as Ray names them (`CPU`, `GPU`).
        stall_timeout_s: a worker that has shards and makes no progress for so long is replaced.
        start_timeout_s: a worker that runs and is not ready for so long is replaced; without one that is, the run stops.
    """

    min_workers: int
    max_workers: int
    resources: dict[str, float]
    stall_timeout_s: float = 600.0
    start_timeout_s: float = 600.0


@dataclass(eq=False)
class _Job:
    shard: Shard
    url: str
    attempts: int = 0  # alone on a worker that died
    suspect: bool = False  # was on a worker that died


@dataclass(eq=False)
class _Worker:
    actor: ActorHandle
    starting: ray.ObjectRef | None
    placing: ray.ObjectRef | None = None
    made_at: float = field(default_factory=lambda: time.monotonic())
    placed_at: float | None = None
    place: tuple[str, int] | None = None  # Ray's id of its node, process id there
    jobs: dict[ray.ObjectRef, _Job] = field(default_factory=dict)
    asked: ray.ObjectRef | None = None  # for its progress
    asked_at: float = 0.0
    moved_at: float = 0.0  # when it last did something
    images: int = 0  # in all, by its own count
    images_committed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def refs(self) -> list[ray.ObjectRef]:
        return [ref for ref in (self.placing, self.starting, self.asked, *self.jobs) if ref is not None]


class ShardPool:
    """Labels shards on actors; iterate over `run()` for the results, in the order in which they end.

    Args:
        make_actor: starts one; it may stay pending in Ray until there is room.
    """

    def __init__(
        self, make_actor: Callable[[], ActorHandle], options: PoolOptions, shards: Sequence[Shard], urls: Sequence[str]
    ) -> None:
        self._make_actor, self._options = make_actor, options
        self._queue = deque(_Job(shard, url) for shard, url in zip(shards, urls, strict=True))
        self._workers: list[_Worker] = []
        self._failed_starts, self._start_from = 0, 0.0
        self._ready_at = self._noticed_at = self._ticked_at = time.monotonic()
        self._seconds_of_lost: defaultdict[str, float] = defaultdict(float)
        self.replaced = 0  # workers that died or hung

    @property
    def num_ready(self) -> int:
        """Workers that can label."""
        return sum(worker.starting is None for worker in self._workers)

    @property
    def images_in_flight(self) -> int:
        """Images labeled in shards that are not committed yet."""
        return sum(max(0, worker.images - worker.images_committed) for worker in self._workers)

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each part of the work, summed over workers and their threads."""
        total = defaultdict(float, self._seconds_of_lost)
        for worker in self._workers:
            for part, seconds in worker.seconds.items():
                total[part] += seconds
        return dict(total)

    def run(self) -> Iterator[LabeledShard | None]:
        """Results as they come; None at least twice a second, so that the caller can show progress.

        Raises:
            StageError: no worker could be started, or a shard killed one after another; a worker's own StageError, and
                any other ValueError or OSError that it raised, as it is.
            WorkerError: an error in the code, once, with its traceback.
        """
        try:
            while self._queue or any(worker.jobs for worker in self._workers):
                with (
                    interrupt.deferred()
                ):  # an exception in the middle of Ray's compiled calls comes out as a SystemError
                    results = self._step()
                yield from results
                yield None
        finally:
            with interrupt.deferred():
                for worker in self._workers:
                    ray.kill(worker.actor)

    def _step(self) -> list[LabeledShard]:
        self._resize()
        self._assign()
        results = list(self._collect())
        self._replace_stalled()
        self._replace_unready()
        self._check_start()
        return results

    def _resize(self) -> None:
        useful = len(self._queue) + sum(bool(worker.jobs) for worker in self._workers)
        least, most = (min(number, useful) for number in (self._options.min_workers, self._options.max_workers))
        while time.monotonic() >= self._start_from and (
            len(self._workers) < least or (len(self._workers) < most and self._has_room())
        ):
            actor = self._make_actor()
            self._workers.append(_Worker(actor, placing=actor.place.remote(), starting=actor.prepare.remote()))
        if not self._queue:
            for worker in [worker for worker in self._workers if not worker.jobs]:
                self._drop(worker)

    def _has_room(self) -> bool:
        """Whether the cluster could place one more worker now, beside those that wait to be placed."""
        now = time.monotonic()
        if any(worker.placing is not None and now - worker.made_at < _PLACING_S for worker in self._workers):
            return False  # one at a time: what is free is known only once it runs
        free = ray.available_resources()
        return all(free.get(name, 0) >= amount for name, amount in self._options.resources.items())

    def _assign(self) -> None:
        ready = [worker for worker in self._workers if worker.starting is None]
        for worker in ready:
            if self._queue and not worker.jobs:
                self._give(worker)
        for worker in ready:
            alone = any(job.suspect for job in worker.jobs.values())
            # the last shards wait for a worker that is free
            if len(self._queue) >= len(ready) and len(worker.jobs) < _IN_FLIGHT and not alone:
                if self._queue[0].suspect:
                    break
                self._give(worker)

    def _give(self, worker: _Worker) -> None:
        job = self._queue.popleft()
        if not worker.jobs:
            worker.moved_at = time.monotonic()
        worker.jobs[worker.actor.label.remote(job.shard, job.url, job.attempts >= _CAREFUL_FROM)] = job

    def _collect(self) -> Iterator[LabeledShard]:
        self._ask_for_progress()
        refs = [ref for worker in self._workers for ref in worker.refs()]
        ready, _ = ray.wait(refs, timeout=_TICK_S) if refs else ([], [])
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        by_ref = {ref: worker for worker in self._workers for ref in worker.refs()}
        for ref in ready:
            worker = by_ref[ref]
            if worker not in self._workers:
                continue  # it died a moment ago, by another of its answers
            try:
                answer = ray.get(ref)
            except RayTaskError as error:
                raise _cause(error) from None
            except RayError as error:  # it died, Ray's memory monitor ended it, or its node is gone
                self._lose(worker, f"died: {first_line(error)}")
            else:
                if (result := self._accept(worker, ref, answer)) is not None:
                    yield result

    def _ask_for_progress(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.starting is None and worker.asked is None and now - worker.asked_at > _PROGRESS_S:
                worker.asked, worker.asked_at = worker.actor.progress.remote(), now

    def _accept(self, worker: _Worker, ref: ray.ObjectRef, answer: Any) -> LabeledShard | None:
        now = time.monotonic()
        if ref == worker.placing:
            worker.placing, worker.place, worker.placed_at = None, answer, now
            return None
        if ref == worker.starting:
            worker.starting, worker.moved_at, self._failed_starts = None, now, 0
            return None
        if ref == worker.asked:
            if answer != (worker.images, worker.seconds):
                worker.moved_at = now
            worker.images, worker.seconds = answer
            worker.asked = None
            return None
        del worker.jobs[ref]
        result: LabeledShard = answer
        worker.images_committed += result.rows + result.quarantined
        worker.moved_at = now
        return result

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        if (pause := now - self._ticked_at - _TICK_S) > 5:  # this process slept, and did not hear the workers
            for worker in self._workers:
                worker.moved_at += pause
                worker.placed_at = None if worker.placed_at is None else worker.placed_at + pause
        self._ticked_at = now
        for worker in list(self._workers):
            if worker.jobs and now - worker.moved_at > self._options.stall_timeout_s:
                _end_process(worker)
                self._lose(worker, f"made no progress for {self._options.stall_timeout_s:g} s (label.stall_timeout_s)")

    def _replace_unready(self) -> None:
        """Of those that wait for room, nothing is known: they are left alone."""
        now, patience = time.monotonic(), self._options.start_timeout_s
        for worker in list(self._workers):
            if worker.starting is not None and worker.placed_at is not None and now - worker.placed_at > patience:
                _end_process(worker)
                self._lose(worker, f"ran for {patience:g} s (label.start_timeout_s)")

    def _lose(self, worker: _Worker, why: str) -> None:
        """Put its shards back. Which of two was at fault shows when they are tried alone."""
        self._drop(worker)
        self.replaced += 1
        if worker.starting is not None:
            self._note_failed_start(why)
            return
        alone = len(worker.jobs) == 1
        for job in reversed(worker.jobs.values()):
            job.suspect, job.attempts = True, job.attempts + alone
            if job.attempts >= _ATTEMPTS:
                raise StageError(
                    f"{job.shard.url}: {job.attempts} labeling workers that had no other shard were lost at it; look for memory "
                    "limits (label.batch_size, label.decode_threads). The last one " + why
                )
            self._queue.appendleft(job)
        shards = " and ".join(job.shard.name for job in worker.jobs.values()) or "no shard"
        print(f"label: a worker with {shards} {why}; its work goes to another", flush=True)

    def _note_failed_start(self, why: str) -> None:
        """Those that are ready go on; new ones are tried again later."""
        self._failed_starts += 1
        if self._failed_starts >= _STARTS and not self.num_ready:
            raise StageError(f"{_STARTS} labeling workers in a row {why} before they had loaded the model")
        print(f"label: a worker {why} before it had loaded the model; another one takes its place", flush=True)
        if self._failed_starts >= _STARTS:
            self._start_from = time.monotonic() + self._options.start_timeout_s

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        for part, seconds in worker.seconds.items():
            self._seconds_of_lost[part] += seconds
        ray.kill(worker.actor)

    def _check_start(self) -> None:
        now = time.monotonic()
        if self.num_ready:
            self._ready_at = now
        waited = now - self._ready_at
        if waited > _NOTICE_S and now - self._noticed_at > _NOTICE_S:
            self._noticed_at = now
            print(f"label: waiting for a worker for {waited:.0f} s; {self._wants()}", flush=True)
        if waited > self._options.start_timeout_s:
            raise StageError(f"no labeling worker could be started in {waited:.0f} s; {self._wants()}")

    def _wants(self) -> str:
        there = {name: ray.cluster_resources().get(name, 0.0) for name in self._options.resources}
        return f"one needs {self._options.resources}, the cluster has {there}"


def here() -> tuple[str, int]:
    """Ray's id of this node, and this process's id: what an actor's `place` answers with."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _end_process(worker: _Worker) -> None:
    """Ray asks an actor to end; one that is stopped or stuck in the kernel does not hear it and would keep its cores forever."""
    if worker.place is not None:
        node, pid = worker.place
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        _kill.options(scheduling_strategy=there).remote(pid)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _cause(error: RayTaskError) -> Exception:
    cause = user_error(error)
    return WorkerError(str(error)) if cause is error else cause
