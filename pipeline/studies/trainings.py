"""Trainings of a study's rows on the labeled images: the job, and its measured duration."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

from data import storage
from data.labels.exclusions import read_keys
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.inputs.streams import labeled_stream
from pipeline.training.job import TrainJob, job_from_config
from pipeline.training.loop import fit
from pipeline.upstream.labeled_splits import classes_of, open_labeled

_FEW_STEPS, _MORE_STEPS = 2, 8  # the difference is timed: start-up cancels out
_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic


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


def training_seconds(job: TrainJob) -> tuple[float, float]:
    """Measure a few steps; return the expected seconds of the training with its evaluations, and of one image's forward pass."""
    start, few = _timed(job, _FEW_STEPS)
    end, more = _timed(job, _MORE_STEPS)
    step_s = max(0.0, end - start) / (more - few)
    image_s = step_s * _FORWARD_SHARE / sum(stream.images_per_step for stream in job.streams)
    assert job.validation is not None, "a study compares on the validation images"
    evaluations = max(1, round(job.config.epochs / job.config.eval_every_epochs))
    return job.total_steps * step_s + evaluations * job.validation.num_samples * image_s, image_s


def _timed(job: TrainJob, steps: int) -> tuple[float, int]:
    """Run a short training with a tiny learning rate; return its seconds and steps."""
    changes = {"epochs": steps / job.steps_per_epoch, "warmup_epochs": 0.0, "lr": 1e-6}
    section = job.config.model_copy(update=changes)
    short = replace(job, name="timing", config=section, folder=storage.join(job.folder, str(steps)), validation=None)
    started = time.monotonic()
    fit(short)
    return time.monotonic() - started, short.total_steps
