"""One training of a study of the teacher's recipe: on the labeled images alone, measured on the validation images."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint
from pipeline.inputs.streams import labeled_stream
from pipeline.studies.trials import Experiment
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from pipeline.upstream.labeled_splits import classes_of, open_labeled

_FEW_STEPS, _MORE_STEPS = 2, 8  # of which the difference is timed: what comes before the first step cancels out
_FORWARD_SHARE = 1 / 3  # of a training step's arithmetic


def _fingerprint(config: Config) -> Fingerprint:
    config.teacher.require_averaged_statistics("teacher")  # whatever teacher.weights says
    labeled, validation = _splits(config)
    inputs = {"labeled": labeled.digest(), "validation": validation.digest()}
    return Fingerprint(config.stage_fields("teacher"), inputs | exclude_inputs(config.data.exclude))


def _train(config: Config, folder: str, sources: tuple[str, ...]) -> dict[str, Any]:
    """Top-1 of the EMA weights on the validation images. No row needs another: there are no `sources`."""
    assert not sources, "see pipeline.studies.resnet_rs"
    job = _job(config, folder)
    fit(job)
    _, metrics = load_trained(job)
    top1 = [line["validation_top1"] for line in metrics if "validation_top1" in line][-1]
    loss = [line["loss"] for line in metrics if "loss" in line][-1]
    assert job.validation is not None, "see _job"
    return {"top1": top1, "loss": loss, "steps": job.total_steps, "images": job.validation.num_samples}


def _expected_seconds(config: Config, sources: tuple[str, ...]) -> float:  # noqa: ARG001 (see _train)
    with tempfile.TemporaryDirectory() as folder:
        return training_seconds(_job(config, folder))[0]


def training_seconds(job: TrainJob) -> tuple[float, float]:
    """Seconds that a training will take (steps × the time of one, and the validation images), and those of an image's forward pass."""
    start, few = _timed(job, _FEW_STEPS)
    end, more = _timed(job, _MORE_STEPS)
    step_s = max(0.0, end - start) / (more - few)
    image_s = step_s * _FORWARD_SHARE / sum(stream.images_per_step for stream in job.streams)
    assert job.validation is not None, "a study compares on the validation images"
    evaluations = max(1, round(job.config.epochs / job.config.eval_every_epochs))
    return job.total_steps * step_s + evaluations * job.validation.num_samples * image_s, image_s


def _timed(job: TrainJob, steps: int) -> tuple[float, int]:
    """Seconds of a short training that learns next to nothing, and its steps."""
    changes = {"epochs": steps / job.steps_per_epoch, "warmup_epochs": 0.0, "lr": 1e-6}
    section = job.config.model_copy(update=changes)
    short = replace(job, name="timing", config=section, folder=storage.join(job.folder, str(steps)), validation=None)
    started = time.monotonic()
    fit(short)
    return time.monotonic() - started, short.total_steps


def _job(config: Config, folder: str) -> TrainJob:
    labeled, validation = _splits(config)
    num_classes, _ = classes_of(config, labeled)
    stream = labeled_stream(labeled, config.teacher.batch_size, read_keys(config.data.exclude))
    return TrainJob(
        name="teacher",
        folder=folder,
        config=config.teacher,
        streams=(stream,),
        num_classes=num_classes,
        num_labeled=stream.num_images,
        seed=config.seed,
        threads=config.threads,
        device=config.resolved_device(),
        validation=validation,
    )


def _splits(config: Config) -> tuple[Split, Split]:
    labeled, validation = open_labeled(config, Layout(config.run_dir))
    assert labeled is not None, "pipeline.studies.stage has checked it"
    assert validation is not None, "pipeline.studies.stage has checked it"
    return labeled, validation


TEACHER_RECIPE = Experiment(_fingerprint, _train, _expected_seconds, scratch=("checkpoints",))
