"""The true labels of unlabeled images (`data.truth`), where they are known: for report and summary alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data import storage
from data.tables import read_table
from pipeline.core.stage import StageError

Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]  # shard → ordinals, labels
_REMEDY = "data.truth must be Parquet of (shard, ordinal, label), or null"


def read_truth(url: str | None) -> Truth:
    """Read the truth file by shard; empty if none is configured. Raises StageError if it does not exist."""
    if url is None:
        return {}
    if not storage.exists(url):
        raise StageError(
            f"data.truth={url}: no such file; expected Parquet of (shard, ordinal, label), or data.truth=null"
        )
    table = read_table(url, _REMEDY, ["shard", "ordinal", "label"]).sort_by("shard")
    ordinals, labels = table.column("ordinal").to_numpy(), table.column("label").to_numpy()
    names, starts = np.unique(table.column("shard").to_numpy(zero_copy_only=False).astype(str), return_index=True)
    ends = [*starts[1:], len(labels)]
    return {str(name): (ordinals[a:b], labels[a:b]) for name, a, b in zip(names, starts, ends, strict=True)}


def true_labels(truth: Truth, shard: str, ordinal: np.ndarray) -> np.ndarray:
    """The true label of each ordinal of a shard, int64 (N,); −1 if unknown."""
    if shard not in truth or not len(truth[shard][0]):
        return np.full(len(ordinal), -1, np.int64)
    known, labels = truth[shard]
    order = np.argsort(known, kind="stable")
    ordinals, labels = known[order], labels[order]
    place = np.minimum(np.searchsorted(ordinals, ordinal), len(ordinals) - 1)
    return np.where(ordinals[place] == ordinal, labels[place], -1)
