"""The train-test resolution fix (FixRes, arXiv 1906.06423): a few last epochs at a larger image size, of the last layers alone.

Random crops show objects larger than inference's centre crop does. So a network is better at a larger size than it was trained at, once
the layers after its convolutions know that size (section 3). Trained are the last normalization layer, what follows it, and the
classifier, on images without noise (section 4.2). Noisy Student (arXiv 1911.04252, section 3.1) ends with it.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from data import storage
from pipeline.core.schema import AugmentConfig, StudentConfig
from pipeline.training.job import TrainJob

logger = logging.getLogger(__name__)

FOLDER = "fix_resolution"
_CLEAN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0, num_ops=0)
"""The whole centre square of an image, resized: the view of inference at crop_pct=1, to within half a pixel."""


def fix_resolution_job(job: TrainJob, student: StudentConfig) -> TrainJob | None:
    """The training after the student's own, from its EMA weights; None unless student.fix_resolution_epochs > 0."""
    if not student.fix_resolution_epochs:
        return None
    if student.augment.crop == "pad_crop":
        logger.warning(
            "student.augment.crop=pad_crop shows objects at their own size: there is nothing to fix, and enlarging them costs accuracy"
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
    return replace(job, folder=folder, config=config, streams=(labeled,), initial=None, starts_from=job)
