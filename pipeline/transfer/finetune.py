"""Fine-tune a backbone on a data set: a training of all layers with a fresh head for each setting of a small grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import numpy as np

from data import storage
from pipeline.core.schema import AugmentConfig, TrainConfig
from pipeline.core.schema.transfer import FinetuneConfig
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.inputs.streams import labeled_stream
from pipeline.models.initial_weights import InitialWeights
from pipeline.models.registry import build_model
from pipeline.models.weights import WeightsInfo, save_weights
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit
from pipeline.training.state import load_trained
from pipeline.transfer.backbones import Backbone
from pipeline.transfer.probes import Probe, best_of
from pipeline.transfer.sets import LabeledSet

INITIAL, TRAININGS = "initial", "trainings"  # folders of a cell, removed when it is done


def finetune(jobs: Sequence[TrainJob], backbone: Backbone, data: LabeledSet, folder: str, batch_size: int) -> Probe:
    """Run every training, the last validation accuracy chooses, and the chosen model predicts the test images.

    A killed call continues with the last checkpoint of the training that it was in.

    Args:
        jobs: of `jobs_of`, with this backbone, data and folder.
        batch_size: of predictions.
    """
    initial = _write_initial(backbone, data, storage.join(folder, INITIAL)) if backbone.kind != "random" else None
    jobs = [replace(job, initial=initial) for job in jobs]
    for job in jobs:
        fit(job)
    grid = [_setting(job.config) | {"validation_top1": _validation_top1(job)} for job in jobs]
    chosen = best_of(grid)
    labels, predicted = _predict(jobs[grid.index(chosen)], backbone, data, batch_size)
    return Probe(tuple(grid), chosen, labels, predicted)


def jobs_of(
    backbone: Backbone,
    data: LabeledSet,
    section: FinetuneConfig,
    folder: str,
    threads: int,
    device: str,
    batch_size: int,
) -> list[TrainJob]:
    """A training for each setting of the grid, from fresh weights.

    Args:
        folder: of the cell.
        threads, device: see `TrainJob`.
        batch_size: of evaluations.
    """
    settings = [
        {"lr": lr, "epochs": epochs, "weight_decay": weight_decay}
        for lr, epochs, weight_decay in product(section.lr, section.epochs, section.weight_decay)
    ]
    return [
        TrainJob(
            name="finetune",
            folder=storage.join(folder, TRAININGS, str(number)),
            config=_recipe(backbone, section, setting, batch_size),
            streams=(labeled_stream(data.labeled, section.batch_size),),
            num_classes=data.num_classes,
            num_labeled=data.labeled.num_samples,
            seed=backbone.seed,
            threads=threads,
            device=device,
            validation=data.validation,
        )
        for number, setting in enumerate(settings)
    ]


def _setting(config: TrainConfig) -> dict[str, Any]:
    """Where a training is in the grid."""
    return {"lr": config.lr, "epochs": config.epochs, "weight_decay": config.weight_decay}


def _write_initial(backbone: Backbone, data: LabeledSet, folder: str) -> InitialWeights:
    """Write the backbone's weights without a head, which starts fresh."""
    info = WeightsInfo(
        model=backbone.model,
        model_args=dict(backbone.model_args),
        num_classes=data.num_classes,
        **asdict(backbone.preprocessing),
    )
    save_weights(folder, backbone.network().state_dict(), info)
    return InitialWeights("transfer.finetune", folder, grows=True)


def _recipe(backbone: Backbone, section: FinetuneConfig, setting: dict[str, Any], batch_size: int) -> TrainConfig:
    """SGD with Nesterov momentum and a cosine, without warm-up, EMA and regularization but weight decay (arXiv 2002.05709, B.8.2)."""
    sight = backbone.preprocessing
    return TrainConfig(
        model=backbone.model,
        model_args=dict(backbone.model_args),
        image_size=sight.image_size,
        crop_pct=sight.crop_pct,
        interpolation=sight.interpolation,
        mean=sight.mean,
        std=sight.std,
        precision=sight.precision,
        augment=AugmentConfig.model_validate(section.augment.model_dump()),
        batch_size=section.batch_size,
        optimizer="nesterov",
        warmup_epochs=0,
        label_smoothing=0,
        dropout=0,
        stochastic_depth=0,
        ema_decay=0,
        bn_momentum=0.1,
        eval_every_epochs=setting["epochs"],
        eval_batch_size=batch_size,
        loader_workers=section.loader_workers,
        **setting,
    )


def _validation_top1(job: TrainJob) -> float:
    metrics = load_trained(job)[1]
    return next(line["validation_top1"] for line in reversed(metrics) if "validation_top1" in line)


def _predict(job: TrainJob, backbone: Backbone, data: LabeledSet, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """True and predicted labels of the test images, (N,) int64 each."""
    model = build_model(backbone.model, data.num_classes, backbone.model_args)
    model.load_state_dict(load_trained(job)[0])
    logits, labels = predict_split(data.test, Predictor(model, backbone.preprocessing, job.device, batch_size))
    return labels, logits.argmax(axis=1)
