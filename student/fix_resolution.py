"""The student's last part: a few epochs at a larger size, on labeled images without noise; see `pipeline.training.freezing`."""

from __future__ import annotations

import logging
from dataclasses import replace

from data import storage
from pipeline.core.schema import AugmentConfig, StudentConfig
from pipeline.training.loop import TrainJob

logger = logging.getLogger(__name__)

FOLDER = "fix_resolution"
_CLEAN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0, num_ops=0)
"""The whole middle square of an image, resized: what inference at crop_pct=1 sees, but for rounding, to half a pixel."""


def fix_resolution_job(job: TrainJob, student: StudentConfig) -> TrainJob | None:
    """The training that follows the student's own and starts from its EMA weights; None when it is not asked for."""
    if not student.fix_resolution_epochs:
        return None
    if student.augment.crop == "pad_crop":
        logger.warning(
            "student.augment.crop=pad_crop shows objects at one size: enlarging them now costs accuracy, where nothing was to be fixed"
        )
    config = student.model_copy(
        update={
            "epochs": student.fix_resolution_epochs,
            "image_size": student.fix_resolution_image_size,
            "lr": student.fix_resolution_lr,
            "warmup_epochs": 0.0,
            "augment": _CLEAN,
            "crop_pct": 1.0,
            "mixup": 0.0,
            "dropout": 0.0,
            "stochastic_depth": 0.0,
        }
    )
    labeled = replace(job.streams[0], images_per_step=student.batch_size)
    folder = storage.join(job.folder, FOLDER)
    return replace(job, folder=folder, config=config, streams=(labeled,), starts_from=job)
