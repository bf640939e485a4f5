"""Features of a data set: computed once per backbone and set, kept in the run directory for every method that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy

from data import storage
from data.errors import DataError
from data.shards.split import Split
from data.storage.failpoint import failpoint
from pipeline.core.schema.transfer import SPLITS
from pipeline.inference.predictor import Predictor, predict_split
from pipeline.transfer.sets import LabeledSet

FILES = tuple(f"{split}.safetensors" for split in SPLITS)


@dataclass(frozen=True, eq=False)
class Features:
    """Features (N, F) float32 and labels (N,) int64 of a split, in shard order."""

    values: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __add__(self, other: Features) -> Features:
        return Features(np.concatenate([self.values, other.values]), np.concatenate([self.labels, other.labels]))


def write_features(folder: str, data: LabeledSet, predictor: Predictor) -> int:
    """Write a file per split, except those that are there; return the number of features F.

    Args:
        predictor: its model returns features.

    Raises:
        DataError: an image cannot be decoded.
    """
    for name, file in zip(SPLITS, FILES, strict=True):
        url = storage.join(folder, file)
        if not storage.exists(url):
            failpoint(f"features-{name}")
            _write(url, getattr(data, name), predictor)
    return int(read_features(folder, SPLITS[0]).values.shape[1])


def _write(url: str, split: Split, predictor: Predictor) -> None:
    values, labels = predict_split(split, predictor)
    if not np.isfinite(values).all():
        raise DataError(f"{url}: features are not finite; the weights of this backbone are damaged")
    storage.write_bytes(url, safetensors.numpy.save({"features": values, "labels": labels}))


def read_features(folder: str, split: str) -> Features:
    """Read a split's features. Raises DataError where the file is missing or damaged."""
    url = storage.join(folder, f"{split}.safetensors")
    try:
        tensors = safetensors.numpy.load(storage.read_bytes(url))
        return Features(tensors["features"], tensors["labels"])
    except storage.StorageError:  # the store did not answer: the file may be right
        raise
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise DataError(
            f"{url}: missing or damaged ({error}); remove the folder {folder}, and stage=transfer makes it again"
        ) from error
