"""Where training runs: in this process, or in several under Ray Train."""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from data import storage
from pipeline.cluster import start_ray
from pipeline.training.fit import TrainJob, fit


def run_training(job: TrainJob, ray_address: str | None) -> None:
    """Run `fit`, in as many processes as `config.workers` says (gloo on CPUs, NCCL on GPUs).

    Raises:
        What `fit` raises; under Ray Train, wrapped in its TrainingFailedError.
    """
    if job.config.workers == 1:
        fit(job)
        return
    start_ray(ray_address)
    use_gpu = job.device == "cuda"
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
    trainer.fit()


def _ray_folder(job: TrainJob) -> str:
    folder = storage.join(job.folder, "ray")
    return str(storage.local_path(folder).resolve()) if storage.is_local(folder) else folder


def _fit_worker(config: dict[str, Any]) -> None:
    fit(config["job"])
