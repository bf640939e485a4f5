"""Run a training in this process, or in several under Ray Train; start lost processes again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from data import storage
from pipeline.core import interrupt
from pipeline.core.devices import is_elsewhere
from pipeline.core.ray_runtime import first_line, start_ray
from pipeline.inputs.loader import LoaderLostError
from pipeline.training.driver_link import printing_at_driver, show_texts, start_link
from pipeline.training.job import TrainingError, TrainJob
from pipeline.training.loop import fit

_REPLACEMENT_S = 600  # to wait for a node that replaces a lost one
_POLL_S = 0.2
_LOST = (ray.exceptions.RayError, MemoryError, LoaderLostError)


def run_training(job: TrainJob, ray_address: str | None) -> None:
    """Run `fit` in `config.workers` processes (gloo on CPUs, NCCL on GPUs).

    When a process is lost, start all of them again from the last checkpoint, at most `config.max_failures` times. After Ctrl-C or
    SIGTERM they save at their next step and end; after the loss of the run directory's lock they end without saving.

    Raises:
        TrainingError: Ray has too few processors, or processes were lost too often.
        Interrupted: a signal came; the state is saved.
        ray.train.TrainingFailedError: an error in `fit` that is neither a ValueError nor an OSError.
        ValueError, OSError: what `fit` raises.
    """
    if job.config.workers == 1 and not is_elsewhere(job.device):
        fit(job)
        return
    start_ray(ray_address)
    failures, patience_s = 0, 0.0
    with interrupt.deferred():
        while not interrupt.pending():
            _wait_for_processors(job, patience_s)
            error = _run_once(job)
            if error is None or interrupt.pending():
                return
            failures, patience_s = failures + 1, _REPLACEMENT_S
            _raise_or_report(job, error, failures)


def _raise_or_report(job: TrainJob, error: ray.train.TrainingFailedError, failures: int) -> None:
    """Raise what would fail again, or has failed too often; else report the restart.

    Errors of the user's or the machine's making (ValueError, OSError) and bugs would come again. A RuntimeError may be torch's, about
    the connection to a process that is gone.
    """
    causes = _causes(error)
    lost = next((cause for cause in causes if _is_loss(cause)), None)
    if lost is None:
        for cause in causes:
            if isinstance(cause, ValueError | OSError):
                raise cause from None
        if failures > job.config.max_failures or not all(isinstance(cause, RuntimeError) for cause in causes):
            raise error from None
    cause = lost or error
    loss = f"{job.name}: a training process was lost ({type(cause).__name__}: {first_line(cause)})"
    allowed = f"{job.name}.max_failures={job.config.max_failures}"
    if failures > job.config.max_failures:
        raise TrainingError(
            f"{loss}, {failures} times now, and {allowed}; check memory and nodes, then the same command continues from the last "
            "checkpoint"
        )
    print(f"{loss}; all are started again from the last checkpoint ({failures} of {allowed})")


def _causes(error: ray.train.TrainingFailedError) -> list[BaseException]:
    """The error of each process that failed, by rank; for a process that is gone, the cause of its failed health check."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    return [getattr(failure, "health_check_failure", failure) for _, failure in sorted(failures.items())]


def _is_loss(cause: BaseException) -> bool:
    """True if a process is gone or hangs; Ray Train reports one that hangs as an error type of its own."""
    return isinstance(cause, _LOST) or type(cause).__module__.startswith("ray.train.")


def _run_once(job: TrainJob) -> ray.train.TrainingFailedError | None:
    """Run one group of processes to its end; return its failure, or None."""
    link = start_link()
    with ThreadPoolExecutor(1) as pool:  # in the main thread, Ray Train would install its own handler of Ctrl-C
        training: Future[Any] = pool.submit(_trainer(job, link).fit)
        while wait([training], _POLL_S).not_done and not interrupt.pending():
            show_texts(link)
        if interrupt.pending():
            link.request_stop.remote(interrupt.may_save())
    show_texts(link)
    error = training.exception()
    if error is None or isinstance(error, ray.train.TrainingFailedError):
        return error
    raise error


def _trainer(job: TrainJob, link: Any) -> TorchTrainer:
    use_gpu = job.device == "cuda"
    return TorchTrainer(
        _fit_worker,
        train_loop_config={"job": job, "link": link},
        scaling_config=ScalingConfig(
            num_workers=job.config.workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": 1}
        ),
        # No restarts by Ray Train, which would also repeat what can only fail again; see `_raise_or_report`.
        run_config=RunConfig(
            name=job.name, storage_path=_ray_folder(job), failure_config=FailureConfig(max_failures=0)
        ),
    )


def _fit_worker(config: dict[str, Any]) -> None:
    link = config["link"]
    requested = link.stop_requested.remote()

    def stop_requested() -> bool:
        if not ray.wait([requested], timeout=0)[0]:
            return False
        if not ray.get(requested):
            raise storage.FencedError("the driver lost its lock on the run directory: nothing is saved")
        return True

    is_first = ray.train.get_context().get_world_rank() == 0
    with printing_at_driver(link) if is_first else nullcontext():
        fit(config["job"], stop_requested)


def _wait_for_processors(job: TrainJob, patience_s: float) -> None:
    """Wait until Ray has enough processors. Raise TrainingError after `patience_s` seconds; Ray itself would wait forever."""
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
