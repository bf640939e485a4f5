"""Trainings of a study's rows on the labeled images."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from data.labels.exclusions import read_keys
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.inputs.streams import labeled_stream
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
