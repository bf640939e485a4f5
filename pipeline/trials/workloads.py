"""What a training or a prediction of a trial has to do, for the time that it takes."""

from __future__ import annotations

import math

from data.shards.split import Split
from pipeline.inputs.loading_time import loading_seconds
from pipeline.models.expected_time import Workload
from pipeline.training.job import TrainJob


def training_workloads(job: TrainJob, labeled: Split) -> list[Workload]:
    """What a training on labeled images has to do: its steps, and the evaluations on its validation images, which it needs.

    Args:
        labeled: whose images are timed for what loading takes.
    """
    section, images = job.config, job.total_steps * job.images_per_step
    steps = Workload(
        job.name, images, job.total_steps, True, section, job.num_classes, job.threads,
        loading_s=images * loading_seconds(labeled, section), loaders=section.loader_workers,
    )  # fmt: skip
    assert job.validation is not None, "trials are compared on validation images"
    evaluations = max(1, round(section.epochs / section.eval_every_epochs))
    return [steps, forward_workload(job, evaluations * job.validation.num_samples, section.eval_batch_size)]


def forward_workload(job: TrainJob, images: int, batch_size: int) -> Workload:
    """Images through the trained model."""
    batches = math.ceil(images / batch_size)
    return Workload(job.name, images, batches, False, job.config, job.num_classes, job.threads)
