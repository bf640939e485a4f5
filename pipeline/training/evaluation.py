"""What a training's EMA weights achieve on labeled images while it runs: a classifier's accuracy, or that of features' neighbours."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

import numpy as np
from torch import nn

from data.progress_bar import ProgressBar
from data.shards.split import Split
from pipeline.inference.nearest_neighbors import leave_one_out_right
from pipeline.inference.predictor import Predictor, count_right, predict_batches
from pipeline.inference.preprocessing import Preprocessing
from pipeline.training.distributed import Ranks
from pipeline.training.job import TrainJob
from pipeline.training.objectives.networks import PretrainingNetwork
from pipeline.training.state import TrainState

_DECODING_THREADS = 2  # at least
_MAX_NEIGHBORS_OF = 20_000  # images whose features are compared; of more, evenly chosen batches
COLLAPSED = 0.1  # feature spread below which nothing is learned


def measure(job: TrainJob, split: Split, state: TrainState, ranks: Ranks) -> dict[str, float]:
    """`validation_top1` of a classifier on `split`; of a pretraining, `knn_top1`: leave-one-out, among the images of `split` that it
    trains on: others may be damaged. Without any, nothing.

    Each rank predicts its share of the batches.
    """
    model = state.ema.module
    if isinstance(model, PretrainingNetwork):
        return _measure_features(job, split, model, state, ranks)
    counts = ranks.gather(count_right(split, _predictor(job, model), _threads(job), ranks.rank, ranks.world))
    right, images = (sum(column) for column in zip(*counts, strict=True))
    if ranks.rank == 0:
        _print(job, state, f"validation top-1 {right / images:.1%} ({images:,} images)")
    return {"validation_top1": right / images}


def _measure_features(
    job: TrainJob, split: Split, model: PretrainingNetwork, state: TrainState, ranks: Ranks
) -> dict[str, float]:
    predictor = _predictor(job, model.backbone)
    stride = max(1, math.ceil(split.num_samples / _MAX_NEIGHBORS_OF))
    share = stride * ranks.rank, stride * ranks.world
    (stream,) = job.streams
    left_out = dict(zip(stream.shard_urls, stream.excluded, strict=False))  # of no shards, if there are none
    view, predict = predictor.view, predictor.logits
    own = list(predict_batches(split, view, predictor.batch_size, predict, _threads(job), *share, left_out))
    batches = [batch for batch in chain.from_iterable(zip_longest(*ranks.gather(own))) if batch is not None]
    if not batches:
        return {}
    features, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    top1 = sum(ranks.gather(leave_one_out_right(features, labels, ranks.rank, ranks.world))) / len(labels)
    if ranks.rank == 0:
        _report(job, state, top1, len(labels))
    return {"knn_top1": top1}


def _report(job: TrainJob, state: TrainState, top1: float, images: int) -> None:
    spread = next((line["spread"] for line in reversed(state.metrics) if "spread" in line), None)
    words = "" if spread is None else f", feature spread {spread:.2f}"
    _print(job, state, f"kNN top-1 {top1:.1%} ({images:,} labeled images, leave-one-out){words}")


def _print(job: TrainJob, state: TrainState, words: str) -> None:
    """Print a line above the progress bar, if there is one."""
    ProgressBar.write(f"{job.name}: step {state.step:,} of {job.total_steps:,}: {words}", file=sys.stdout)
    sys.stdout.flush()


def report_collapse(job: TrainJob, metrics: Sequence[Mapping[str, float]]) -> None:
    """Print a warning when the newest line of metrics is the first one of features that have collapsed, or the first one again."""
    spreads = [line["spread"] for line in metrics if "spread" in line]
    if "spread" not in metrics[-1] or spreads[-1] >= COLLAPSED or any(spread < COLLAPSED for spread in spreads[-2:-1]):
        return
    print(
        f"{job.name}: THE FEATURES HAVE COLLAPSED: all images look alike to it (feature spread {spreads[-1]:.3f}; 1 is even). "
        f"Lower {job.name}.lr, or lengthen {job.name}.warmup_epochs",
        flush=True,
    )


def _predictor(job: TrainJob, model: nn.Module) -> Predictor:
    config = job.config
    preprocessing = Preprocessing.of_training(config)
    return Predictor(model, preprocessing, job.device, config.eval_batch_size, channels_last=config.channels_last)


def _threads(job: TrainJob) -> int:
    return max(_DECODING_THREADS, job.config.loader_workers)
