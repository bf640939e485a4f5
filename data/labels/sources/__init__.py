"""The interface of a source of pseudo-labels: samples, shard by shard, and the same labels as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from ...images.load import load_image
from ..joined_tar import Rows, sample_key

COLUMNS = (
    "__key__", "label", "confidence", "topk_index", "topk_prob", "rest", "copies", "source_shard", "source_ordinal",
    "source_key",
)  # fmt: skip


@dataclass(frozen=True)
class PseudoLabeled:
    """An image and its pseudo-label.

    Attributes:
        image: the encoded bytes, unchanged.
        confidence: the calibrated probability of `label`.
        copies: how often an epoch of the student has the image; 0 when it was not selected.
    """

    key: str
    image: bytes
    label: int
    confidence: float
    copies: int

    def decoded(self) -> Image.Image:
        """The image, RGB and upright. Raises DataError, which names the key."""
        return load_image(self.image, f"the image of key {self.key!r}")


def as_table(rows: Rows, shard: str) -> pa.Table:
    """A shard's rows as a table of COLUMNS, with the keys that an archive gives them."""
    ordinals = rows.labels.column("ordinal")
    columns = {name: rows.labels.column(name) for name in rows.labels.column_names} | {
        "__key__": pa.array([sample_key(shard, ordinal) for ordinal in ordinals.to_pylist()], pa.string()),
        "copies": pa.array(rows.copies.astype(np.uint16)),
        "source_shard": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(rows), np.int32)), [shard]),
        "source_ordinal": ordinals,
        "source_key": rows.labels.column("__key__"),
    }
    return pa.table({name: columns[name] for name in COLUMNS})


class Source(Protocol):
    """Pseudo-labels of one generation; can be pickled to loader processes."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order; None when unknown."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""

    def table(self, shard: int) -> pa.Table:
        """Labels of a shard: COLUMNS. Raises DataError, StorageError, OSError."""

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """A shard's samples, in order. Raises as `table`; damage is found at the end of the shard at the latest."""
