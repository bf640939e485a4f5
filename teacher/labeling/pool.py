"""A pool of Ray actors that label shards.

A worker that dies or hangs is replaced, and its shards go to others. The pool grows while the cluster has room, without waiting for
workers that are still starting.

An actor has four methods: `place()` returns its node and process at once; `prepare()` returns when it is ready to label;
`label(shard, url, careful)` labels a shard, two at a time (careful: workers were lost at this shard); `progress()` answers meanwhile.
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

_MAX_ATTEMPTS = 7  # workers lost with this shard alone before the run stops; workers may also be lost to preemption
_CAREFUL_FROM = 5  # attempts after which crashing images are searched for; not earlier, as the search takes time
_MAX_FAILED_STARTS = 3  # workers in a row that are lost before they are ready
_PLACING_S = 60.0  # wait so long for a worker to be placed before starting another
_TICK_S = 0.5  # limit to wait for Ray, so that signals are noticed
_PROGRESS_S = 1.0  # between two requests for a worker's progress
_NOTICE_S = 60.0  # between two messages about waiting
_IN_FLIGHT = 2  # shards per worker: the second is read while the first one ends


@dataclass(frozen=True)
class PoolOptions:
    """Number of workers, their resources, and time limits.

    Attributes:
        min_workers: requested from Ray at once, whether it has room or not.
        max_workers: more than `min_workers` are started only while the cluster has room.
        resources: of one worker, by Ray's names (`CPU`, `GPU`).
        stall_timeout_s: replace a worker that has shards and makes no progress for so long.
        start_timeout_s: replace a worker that runs but is not ready after so long; stop the run if no worker is ready for so long.
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
    attempts: int = 0  # workers lost while they had this shard alone
    suspect: bool = False  # a worker was lost while it had this shard


@dataclass(eq=False)
class _Worker:
    actor: ActorHandle
    starting: ray.ObjectRef | None
    placing: ray.ObjectRef | None = None
    made_at: float = field(default_factory=lambda: time.monotonic())
    placed_at: float | None = None
    place: tuple[str, int] | None = None  # Ray's node id, process id
    jobs: dict[ray.ObjectRef, _Job] = field(default_factory=dict)
    progress_request: ray.ObjectRef | None = None
    requested_at: float = 0.0
    last_progress_at: float = 0.0
    images: int = 0  # labeled in all, by its own count
    images_committed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def refs(self) -> list[ray.ObjectRef]:
        return [ref for ref in (self.placing, self.starting, self.progress_request, *self.jobs) if ref is not None]


class ShardPool:
    """Label shards on actors; iterate over `run()` for the results.

    Args:
        make_actor: starts an actor; it may stay pending in Ray until there is room.
        urls: label files to write, one per shard.
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
        self.replaced = 0  # number of workers that died or hung

    @property
    def num_ready(self) -> int:
        """Number of workers that are ready to label."""
        return sum(worker.starting is None for worker in self._workers)

    @property
    def images_in_flight(self) -> int:
        """Number of images labeled in shards that are not committed yet."""
        return sum(max(0, worker.images - worker.images_committed) for worker in self._workers)

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each part of the work, summed over workers and their threads."""
        total = defaultdict(float, self._seconds_of_lost)
        for worker in self._workers:
            for part, seconds in worker.seconds.items():
                total[part] += seconds
        return dict(total)

    def run(self) -> Iterator[LabeledShard | None]:
        """Yield results as shards end, and None at least twice a second, so that the caller can show progress.

        Raises:
            StageError: no worker could be started, or all workers with one shard were lost.
            ValueError, OSError: a worker raised it (StageError too).
            WorkerError: a worker raised another error; with its traceback.
        """
        try:
            while self._queue or any(worker.jobs for worker in self._workers):
                with interrupt.deferred():  # an exception within Ray's compiled calls becomes a SystemError
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
        minimum, maximum = (min(number, useful) for number in (self._options.min_workers, self._options.max_workers))
        while time.monotonic() >= self._start_from and (
            len(self._workers) < minimum or (len(self._workers) < maximum and self._has_room())
        ):
            actor = self._make_actor()
            self._workers.append(_Worker(actor, placing=actor.place.remote(), starting=actor.prepare.remote()))
        if not self._queue:
            for worker in [worker for worker in self._workers if not worker.jobs]:
                self._drop(worker)

    def _has_room(self) -> bool:
        """Whether the cluster has room for one more worker; False while another waits to be placed."""
        now = time.monotonic()
        if any(worker.placing is not None and now - worker.made_at < _PLACING_S for worker in self._workers):
            return False  # one at a time: Ray counts its resources only once it is placed
        free = ray.available_resources()
        return all(free.get(name, 0) >= amount for name, amount in self._options.resources.items())

    def _assign(self) -> None:
        ready = [worker for worker in self._workers if worker.starting is None]
        for worker in ready:
            if self._queue and not worker.jobs:
                self._give(worker)
        for worker in ready:
            alone = any(job.suspect for job in worker.jobs.values())
            # no second shard for the last ones: they wait for a free worker
            if len(self._queue) >= len(ready) and len(worker.jobs) < _IN_FLIGHT and not alone:
                if self._queue[0].suspect:
                    break
                self._give(worker)

    def _give(self, worker: _Worker) -> None:
        job = self._queue.popleft()
        if not worker.jobs:
            worker.last_progress_at = time.monotonic()
        worker.jobs[worker.actor.label.remote(job.shard, job.url, job.attempts >= _CAREFUL_FROM)] = job

    def _collect(self) -> Iterator[LabeledShard]:
        self._request_progress()
        refs = [ref for worker in self._workers for ref in worker.refs()]
        ready, _ = ray.wait(refs, timeout=_TICK_S) if refs else ([], [])
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        by_ref = {ref: worker for worker in self._workers for ref in worker.refs()}
        for ref in ready:
            worker = by_ref[ref]
            if worker not in self._workers:
                continue  # lost a moment ago, by another of its answers
            try:
                answer = ray.get(ref)
            except RayTaskError as error:
                raise _cause(error) from None
            except RayError as error:  # the worker died, Ray's memory monitor killed it, or its node is gone
                self._lose(worker, f"died: {first_line(error)}")
            else:
                if (result := self._accept(worker, ref, answer)) is not None:
                    yield result

    def _request_progress(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.starting is None and worker.progress_request is None and now - worker.requested_at > _PROGRESS_S:
                worker.progress_request, worker.requested_at = worker.actor.progress.remote(), now

    def _accept(self, worker: _Worker, ref: ray.ObjectRef, answer: Any) -> LabeledShard | None:
        now = time.monotonic()
        if ref == worker.placing:
            worker.placing, worker.place, worker.placed_at = None, answer, now
            return None
        if ref == worker.starting:
            worker.starting, worker.last_progress_at, self._failed_starts = None, now, 0
            return None
        if ref == worker.progress_request:
            if answer != (worker.images, worker.seconds):
                worker.last_progress_at = now
            worker.images, worker.seconds = answer
            worker.progress_request = None
            return None
        del worker.jobs[ref]
        result: LabeledShard = answer
        worker.images_committed += result.rows + result.quarantined
        worker.last_progress_at = now
        return result

    def _replace_stalled(self) -> None:
        now = time.monotonic()
        if (pause := now - self._ticked_at - _TICK_S) > 5:  # this process was suspended and missed the workers' answers
            for worker in self._workers:
                worker.last_progress_at += pause
                worker.placed_at = None if worker.placed_at is None else worker.placed_at + pause
        self._ticked_at = now
        for worker in list(self._workers):
            if worker.jobs and now - worker.last_progress_at > self._options.stall_timeout_s:
                _end_process(worker)
                self._lose(worker, f"made no progress for {self._options.stall_timeout_s:g} s (label.stall_timeout_s)")

    def _replace_unready(self) -> None:
        """Replace workers that run but do not get ready. Workers that are not placed yet have unlimited time."""
        now, patience = time.monotonic(), self._options.start_timeout_s
        for worker in list(self._workers):
            if worker.starting is not None and worker.placed_at is not None and now - worker.placed_at > patience:
                _end_process(worker)
                self._lose(worker, f"ran for {patience:g} s (label.start_timeout_s)")

    def _lose(self, worker: _Worker, why: str) -> None:
        """Remove a worker and requeue its shards. Each is then tried alone, to find the one at fault."""
        self._drop(worker)
        self.replaced += 1
        if worker.starting is not None:
            self._note_failed_start(why)
            return
        alone = len(worker.jobs) == 1
        for job in reversed(worker.jobs.values()):
            job.suspect, job.attempts = True, job.attempts + alone
            if job.attempts >= _MAX_ATTEMPTS:
                raise StageError(
                    f"{job.shard.url}: {job.attempts} labeling workers that had no other shard were lost at it; look for memory "
                    "limits (label.memory_mb, label.batch_size). The last one " + why
                )
            self._queue.appendleft(job)
        shards = " and ".join(job.shard.name for job in worker.jobs.values()) or "no shard"
        print(f"label: a worker with {shards} {why}; its work goes to another", flush=True)

    def _note_failed_start(self, why: str) -> None:
        """Stop the run after several failed starts without a ready worker; with one, start no other for a while."""
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS and not self.num_ready:
            raise StageError(f"{_MAX_FAILED_STARTS} labeling workers in a row {why} before they had loaded the model")
        print(f"label: a worker {why} before it had loaded the model; another one takes its place", flush=True)
        if self._failed_starts >= _MAX_FAILED_STARTS:
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
        cluster = {name: ray.cluster_resources().get(name, 0.0) for name in self._options.resources}
        return f"one needs {self._options.resources}, the cluster has {cluster}"


def here() -> tuple[str, int]:
    """Ray's id of this node, and this process's id: the answer of an actor's `place`."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _end_process(worker: _Worker) -> None:
    """Kill the process. `ray.kill` only asks the actor, and one that is stopped (SIGSTOP) would keep its cores."""
    if worker.place is not None:
        node, pid = worker.place
        same_node = NodeAffinitySchedulingStrategy(node, soft=False)
        _kill.options(scheduling_strategy=same_node).remote(pid)


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _cause(error: RayTaskError) -> Exception:
    cause = user_error(error)
    return WorkerError(str(error)) if cause is error else cause
