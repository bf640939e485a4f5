"""What features and fine-tunings have to do, for the time that they take. Probes take a moment, which is not counted."""

from __future__ import annotations

from dataclasses import replace

from pipeline.core.schema import TrainConfig
from pipeline.core.schema.transfer import SPLITS, TransferConfig
from pipeline.inputs.loading_time import loading_seconds
from pipeline.models.expected_time import Workload
from pipeline.transfer.backbones import Backbone
from pipeline.transfer.finetune import jobs_of
from pipeline.transfer.sets import LabeledSet
from pipeline.trials.workloads import forward_workload, training_workloads

_FEATURES = 0  # classes of a model without a head


def features_workload(backbone: Backbone, data: LabeledSet, threads: int, batch_size: int) -> Workload:
    """All images of a set through a backbone, which waits while they are read."""
    images = sum(getattr(data, split).num_samples for split in SPLITS)
    section = TrainConfig(
        model=backbone.model, model_args=dict(backbone.model_args), image_size=backbone.preprocessing.image_size
    )
    loading_s = images * loading_seconds(data.labeled, section)
    return Workload(
        "features", images, -(-images // batch_size), False, section, _FEATURES, threads, loading_s=loading_s, loaders=0
    )


def finetune_workloads(
    backbone: Backbone, data: LabeledSet, section: TransferConfig, threads: int, device: str
) -> list[Workload]:
    """The trainings of the grid, and the test images through the chosen model."""
    jobs = jobs_of(backbone, data, section.finetune, "", threads, device, section.batch_size)
    trainings = [work for job in jobs for work in training_workloads(job, data.labeled)]
    test = forward_workload(jobs[0], data.test.num_samples, section.batch_size)
    return [*trainings, replace(test, name="predictions")]
