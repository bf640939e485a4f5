"""How long a core takes to load a training image, timed on a few of the user's: read, decode, crop, augment."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from math import ceil

from data.shards.split import Split
from pipeline.core.schema import TrainConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream

_IMAGES = 16  # timed, after as many to warm up
_FIELDS = {"augment", "image_size", "augment_on", "interpolation"}  # of a training, that loading time depends on
_known: dict[tuple[str, str], float] = {}


def loading_seconds(labeled: Split, section: TrainConfig) -> float:
    """Seconds of one core per image of a training, with all its views. Trainings that load images alike are timed once.

    Raises DataError: an image cannot be decoded, or a shard has changed.
    """
    key = labeled.digest(), section.model_dump_json(include=_FIELDS)
    if key not in _known:
        _known[key] = _timed(labeled, section)
    return _known[key]


def _timed(labeled: Split, section: TrainConfig) -> float:
    images = min(2 * _IMAGES, labeled.num_samples)
    stream = replace(labeled_stream(labeled, images), views=section.views, targets="none")
    with closing(TrainBatches([stream], section, num_classes=0, seed=0)) as batches:
        pieces = ceil(images / _IMAGES)
        batches.piece(0, 0, pieces)
        started = time.perf_counter()
        timed = batches.piece(0, pieces - 1, pieces)
        return (time.perf_counter() - started) / len(timed.images)
