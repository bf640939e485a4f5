"""Where training runs: in this process, or in several under Ray Train."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from data import storage
from pipeline.cluster import start_ray
from pipeline.training.fit import TrainingError, TrainJob, fit


def run_training(job: TrainJob, ray_address: str | None) -> None:
    """Run `fit`, in as many processes as `config.workers` says (gloo on CPUs, NCCL on GPUs).

    Raises:
        TrainingError: Ray has no room for that many processes.
        What `fit` raises. Under Ray Train, errors that are no ValueError or OSError come wrapped in its TrainingFailedError.
    """
    if job.config.workers == 1:
        fit(job)
        return
    start_ray(ray_address)
    use_gpu = job.device == "cuda"
    _check_room(job, "GPU" if use_gpu else "CPU")
    trainer = TorchTrainer(
        _fit_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=job.config.workers, use_gpu=use_gpu, resources_per_worker=None if use_gpu else {"CPU": 1}
        ),
        run_config=RunConfig(
            name=job.name, storage_path=_ray_folder(job), failure_config=FailureConfig(max_failures=0)
        ),
    )
    handler = signal.getsignal(signal.SIGINT)  # Ray Train puts its own in its place, and leaves it there
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _check_room(job: TrainJob, resource: str) -> None:
    """Ray would wait for ever for what it does not have."""
    room = int(ray.cluster_resources().get(resource, 0))
    if room < job.config.workers:
        raise TrainingError(
            f"{job.name}.workers={job.config.workers}, but Ray has {room} {resource}s; give fewer workers, or another ray_address="
        )


def _cause(error: ray.train.TrainingFailedError) -> BaseException:
    """What `fit` raised in a worker, if it is of the user's or the machine's making; else Ray's error with its traceback.

    When one worker fails, the others lose their connection to it: theirs are other errors.
    """
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    causes = [
        getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())
    ]  # Ray wraps with a traceback
    return next((cause for kind in (ValueError, OSError) for cause in causes if isinstance(cause, kind)), error)


def _ray_folder(job: TrainJob) -> str:
    folder = storage.join(job.folder, "ray")
    return str(storage.local_path(folder).resolve()) if storage.is_local(folder) else folder


def _fit_worker(config: dict[str, Any]) -> None:
    fit(config["job"])
