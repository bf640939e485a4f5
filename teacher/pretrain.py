"""stage=pretrain: teach a model features on labeled and unlabeled images alike, without labels (SimCLR, SimCLRv2 or BYOL).

It trains by the same loop as teacher and student. Labels serve to measure the features alone, while it runs. Its weights are the
backbone's, without the head; a teacher begins with them (`teacher.init=pretrain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from torch import Tensor

from data import storage
from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from pipeline.core.devices import require_device
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, StageError, open_stage, require_done
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inference.stage_weights import WEIGHTS_FOLDER
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.training.job import job_from_config
from pipeline.training.launch import run_training
from pipeline.training.metrics_log import METRICS_NAME
from pipeline.training.state import load_trained
from pipeline.upstream.labeled_splits import classes_of
from teacher.screening.stream import LEFT_OUT_NAME, pretrain_inputs, pretrain_stream

STAGE: Literal["pretrain"] = "pretrain"
_FIGURES = ("loss", "spread", "knn_top1")  # of metrics.jsonl, whose last values the summary has


def pretrain(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; return its done-record.

    Raises:
        StageError: the stage refuses, there are no images, or too many cannot be decoded.
        DataError: shards are damaged, or labels of data.labeled are missing.
    """
    labeled, unlabeled = open_images(config, layout)

    def check() -> None:
        require_device(config.resolved_device(), config.ray_address)
        if labeled is not None:
            check_labeled(labeled, classes_of(config, labeled)[0])

    stage = open_stage(layout.pretrain, STAGE, fingerprint(config, labeled, unlabeled), force, check=check)
    if stage.is_done:
        return require_done(layout.pretrain, STAGE)
    section = config.pretrain
    images = pretrain_stream(config, labeled, unlabeled, stage.folder, section.batch_size, section.views)
    job = job_from_config(config, STAGE, stage.folder, (images.spec,), 0, labeled)
    run_training(job, config.ray_address)
    state, metrics = load_trained(job)
    _commit(stage, config, state, images.summary | {"steps": job.total_steps} | _last_figures(metrics))
    return require_done(layout.pretrain, STAGE)


def open_images(config: Config, layout: Layout) -> tuple[Split | None, Split | None]:
    """Open data.labeled and data.unlabeled; None for one that is not configured. Raises StageError without either."""
    if config.data.modality != "image":
        raise StageError(
            f"data.modality={config.data.modality}: stage=pretrain takes images alone; give another teacher.init"
        )
    patterns = config.data.labeled, config.data.unlabeled
    if not any(patterns):
        raise StageError("data.labeled and data.unlabeled are empty; give shards of images to pretrain on")
    labeled, unlabeled = (open_split(some, layout.indexes) if some else None for some in patterns)
    return labeled, unlabeled


def fingerprint(config: Config, labeled: Split | None, unlabeled: Split | None) -> Fingerprint:
    """What the pretraining depends on. Raises DataError when data.exclude or the hashes of held-out images cannot be read."""
    return Fingerprint(config.stage_fields(STAGE), pretrain_inputs(config, labeled, unlabeled))


def _last_figures(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: value for line in metrics for name, value in line.items() if name in _FIGURES}


def _commit(stage: Stage, config: Config, state: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
    """Write the backbone's weights with their preprocessing; commit the stage."""
    section = config.pretrain
    info = WeightsInfo(
        model=section.model,
        model_args=section.model_args,
        num_classes=0,
        **asdict(Preprocessing.of_training(section)),
        seed=config.seed,
        provenance=stage.fingerprint.as_json(),
    )
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    save_weights(stage.path(WEIGHTS_FOLDER), backbone, info)
    files = [f"{WEIGHTS_FOLDER}/{name}" for name in storage.list_names(stage.path(WEIGHTS_FOLDER))]
    stage.commit([*files, METRICS_NAME, LEFT_OUT_NAME], summary)
