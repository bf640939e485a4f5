"""Where training runs: in this process, or in several under Ray Train."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data import storage
from pipeline.core import interrupt
from pipeline.core.ray_runtime import first_line, start_ray
from pipeline.inputs.loader import LoaderLostError
from pipeline.training.loop import TrainingError, TrainJob, fit

_ROOM_AGAIN_S = 600  # for a node that takes a lost one's place
_POLL_S = 0.2
_LOST = (ray.exceptions.RayError, MemoryError, LoaderLostError)


def run_training(job: TrainJob, ray_address: str | None) -> None:
    """Run `fit`, in as many processes as `config.workers` says (gloo on CPUs, NCCL on GPUs).

    When one of them is lost, Ray Train starts all again, and they continue from the last checkpoint. After Ctrl-C or SIGTERM they
    save at their next step, and end; after the loss of the run directory they end without saving.

    Raises:
        TrainingError: Ray has no room for that many processes, or they were lost more than `config.max_failures` times.
        Interrupted: a signal came; the state is saved.
        What `fit` raises. Errors of other kinds than ValueError and OSError come wrapped in Ray Train's TrainingFailedError.
    """
    if job.config.workers == 1:
        fit(job)
        return
    start_ray(ray_address)
    failures, patience_s = 0, 0.0
    with interrupt.deferred():
        while not interrupt.pending():
            _wait_for_room(job, patience_s)
            error = _run_once(job)
            if error is None or interrupt.pending():
                return
            failures, patience_s = failures + 1, _ROOM_AGAIN_S
            _raise_or_tell(job, error, failures)


def _raise_or_tell(job: TrainJob, error: ray.train.TrainingFailedError, failures: int) -> None:
    """Return when the processes are to be started again."""
    causes = _causes(error)
    lost = next((cause for cause in causes if _is_loss(cause)), None)
    if lost is None:  # what would come again: errors of the user's or the machine's making, and bugs
        for cause in causes:
            if isinstance(cause, ValueError | OSError):
                raise cause from None
        if not all(isinstance(cause, RuntimeError) for cause in causes):  # torch's, of a connection to one that failed
            raise error from None
    if failures <= job.config.max_failures:
        print(
            f"{job.name}: {_what(lost or error)}; all are started again from the last checkpoint "
            f"({failures} of {job.name}.max_failures={job.config.max_failures})"
        )
        return
    if lost is None:
        raise error from None
    raise TrainingError(
        f"{job.name}: {_what(lost)}, {failures} times now, and {job.name}.max_failures={job.config.max_failures}; see to memory and "
        "nodes, then the same command continues from the last checkpoint"
    )


def _causes(error: ray.train.TrainingFailedError) -> list[BaseException]:
    """What went wrong in each process that failed, by rank.

    A process that is gone comes as the health check that failed; what is asked for is why it did.
    """
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return [getattr(failure, "health_check_failure", failure) for _, failure in sorted(failures.items())]


def _is_loss(cause: BaseException) -> bool:
    """True for a process that is gone or hangs; what hangs, Ray Train tells in an error of its own."""
    return isinstance(cause, _LOST) or type(cause).__module__.startswith("ray.train.")


def _what(cause: BaseException) -> str:
    return f"a training process was lost ({type(cause).__name__}: {first_line(cause)})"


def _run_once(job: TrainJob) -> ray.train.TrainingFailedError | None:
    """One group of processes, to its end; returns how it failed, or None."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stop: Any = ray.remote(_Stop).options(num_cpus=0, scheduling_strategy=here).remote()
    with ThreadPoolExecutor(1) as pool:  # not in the main thread, where Ray Train would put its own handler of Ctrl-C
        training: Future[Any] = pool.submit(_trainer(job, stop).fit)
        while wait([training], _POLL_S).not_done and not interrupt.pending():
            pass
        if interrupt.pending():
            stop.request.remote(interrupt.may_save())
    error = training.exception()
    if error is None or isinstance(error, ray.train.TrainingFailedError):
        return error
    raise error


def _trainer(job: TrainJob, stop: Any) -> TorchTrainer:
    use_gpu = job.device == "cuda"
    return TorchTrainer(
        _fit_worker,
        train_loop_config={"job": job, "stop": stop},
        scaling_config=ScalingConfig(
            num_workers=job.config.workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": 1}
        ),
        # What fails is looked at here: Ray Train would try again what can only fail again.
        run_config=RunConfig(
            name=job.name, storage_path=_ray_folder(job), failure_config=FailureConfig(max_failures=0)
        ),
    )


class _Stop:
    """An actor that tells the training processes to end."""

    def __init__(self) -> None:
        self._requested, self._saves = asyncio.Event(), True

    async def request(self, saves: bool) -> None:
        """Let all `requested` end."""
        self._saves = saves
        self._requested.set()

    async def requested(self) -> bool:
        """Ends when a stop is requested; whether the state is to be saved."""
        await self._requested.wait()
        return self._saves


def _fit_worker(config: dict[str, Any]) -> None:
    requested = config["stop"].requested.remote()

    def stop_requested() -> bool:
        if not ray.wait([requested], timeout=0)[0]:
            return False
        if not ray.get(requested):
            raise storage.FencedError("the driver lost its lock on the run directory: nothing is saved")
        return True

    fit(config["job"], stop_requested)


def _wait_for_room(job: TrainJob, patience_s: float) -> None:
    """Raise TrainingError when Ray has too few processors for the job after so many seconds; Ray itself would wait for ever."""
    resource = "GPU" if job.device == "cuda" else "CPU"
    deadline = time.monotonic() + patience_s
    while (room := int(ray.cluster_resources().get(resource, 0))) < job.config.workers:
        if interrupt.pending():
            return
        if time.monotonic() >= deadline:
            raise TrainingError(
                f"{job.name}.workers={job.config.workers}, but Ray has {room} {resource}s; give fewer workers (a training that has "
                "begun continues with them), or another ray_address="
            )
        time.sleep(_POLL_S)


def _ray_folder(job: TrainJob) -> str:
    folder = storage.join(job.folder, "ray")
    return str(storage.local_path(folder).resolve()) if storage.is_local(folder) else folder
