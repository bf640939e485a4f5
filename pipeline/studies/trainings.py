"""Trainings of a study's rows on the labeled images: the job, and what it has to do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from data.labels.exclusions import read_keys
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.inputs.loading_time import loading_seconds
from pipeline.inputs.streams import labeled_stream
from pipeline.models.expected_time import Workload
from pipeline.training.job import TrainJob, job_from_config
from pipeline.upstream.labeled_splits import classes_of, open_labeled


def open_splits(config: Config) -> tuple[Split, Split]:
    """Open the labeled and the validation split, which `pipeline.studies.stage` has required."""
    labeled, validation = open_labeled(config, Layout(config.run_dir))
    assert labeled is not None, "pipeline.studies.stage has checked it"
    assert validation is not None, "pipeline.studies.stage has checked it"
    return labeled, validation


def labeled_job(
    config: Config, role: Literal["teacher", "student"], folder: str, labeled_per_step: int | None = None
) -> TrainJob:
    """Return a training of a section on the labeled images, validated on the validation images.

    Args:
        labeled_per_step: labeled images per step, from which the number of steps follows; None: all images of a batch.
    """
    labeled, validation = open_splits(config)
    batch_size = getattr(config, role).batch_size
    stream = labeled_stream(labeled, batch_size, read_keys(config.data.exclude))
    job = job_from_config(config, role, folder, (stream,), classes_of(config, labeled)[0], validation)
    return replace(job, num_labeled=stream.num_images * batch_size // (labeled_per_step or batch_size))


def training_workloads(job: TrainJob, labeled: Split) -> list[Workload]:
    """What a training of `labeled_job` has to do: its steps, and the evaluations on the validation images."""
    section, images = job.config, job.total_steps * job.images_per_step
    steps = Workload(
        job.name, images, job.total_steps, True, section, job.num_classes, job.threads,
        loading_s=images * loading_seconds(labeled, section), loaders=section.loader_workers,
    )  # fmt: skip
    assert job.validation is not None, "a study compares on the validation images"
    evaluations = max(1, round(section.epochs / section.eval_every_epochs))
    return [steps, forward_workload(job, evaluations * job.validation.num_samples, section.eval_batch_size)]


def forward_workload(job: TrainJob, images: int, batch_size: int) -> Workload:
    """Images through the trained model."""
    batches = math.ceil(images / batch_size)
    return Workload(job.name, images, batches, False, job.config, job.num_classes, job.threads)
