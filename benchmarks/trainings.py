"""Speed of `fit()` on photos, or on one batch that is in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest import mock

from data.shards.split import Split
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream
from pipeline.training.job import TrainJob
from pipeline.training.loop import fit


def fit_rate(
    split: Split,
    config: TrainConfig,
    steps: int,
    warm_up: int,
    num_classes: int,
    device: str = "cpu",
    run: Callable[[TrainJob], None] = fit,
) -> float:
    """Return the steps per second of a training after its first `warm_up` steps, from timing.jsonl.

    Args:
        config: with `log_every_steps` a divisor of `warm_up`.
        run: trains the job.
    """
    with tempfile.TemporaryDirectory() as folder:
        run(training_job(split, config, steps, num_classes, device, folder))
        lines = [json.loads(line) for line in (Path(folder) / "timing.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines}
    return (steps - warm_up) / (times[steps] - times[warm_up])


def on_one_batch(
    split: Split, config: TrainConfig, steps: int, warm_up: int, num_classes: int, device: str = "cpu"
) -> float:
    """Return the steps per second when every step has the same batch, made before the first: the model's own speed."""
    with closing(TrainBatches((labeled_stream(split, config.batch_size),), config, num_classes, seed=0)) as batches:
        batch = batches[0]
    with mock.patch.object(TrainBatches, "__getitem__", return_value=batch):
        return fit_rate(split, config.model_copy(update={"loader_workers": 0}), steps, warm_up, num_classes, device)


def training_job(split: Split, config: TrainConfig, steps: int, num_classes: int, device: str, folder: str) -> TrainJob:
    """Return a training of `steps` steps."""
    return TrainJob(
        name="bench",
        folder=folder,
        config=config.model_copy(update={"epochs": steps * config.batch_size / split.num_samples}),
        streams=(labeled_stream(split, config.batch_size),),
        num_classes=num_classes,
        num_labeled=split.num_samples,
        seed=0,
        threads=1,
        device=device,
    )
