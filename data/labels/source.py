"""What every source of pseudo-labels gives: samples, shard by shard, and the same labels as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from data.labels.joined_tar import Rows, sample_key

COLUMNS = (
    "__key__", "label", "confidence", "topk_index", "topk_prob", "rest", "copies", "source_shard", "source_ordinal",
    "source_key",
)  # fmt: skip


@dataclass(frozen=True)
class PseudoLabeled:
    """An image and what was said of it.

    Attributes:
        image: the encoded bytes, as they were found.
        confidence: the calibrated probability of `label`.
        copies: how often the student was to see the image; 0 when it was not selected.
    """

    key: str
    image: bytes
    label: int
    confidence: float
    copies: int


def as_table(rows: Rows, shard: str) -> pa.Table:
    """COLUMNS of a shard's rows, with the keys that they have in an archive."""
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
    """Pseudo-labels of one generation; plain data that travels to loader processes."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order, where they are known."""

    @property
    def num_shards(self) -> int:
        """Shards, by whose numbers the rest is asked for."""

    def table(self, shard: int) -> pa.Table:
        """COLUMNS of a shard's samples. Raises DataError, StorageError, OSError."""

    def samples(self, shard: int) -> Iterator[PseudoLabeled]:
        """A shard's samples, in order. Raises as `table`; of what is found to be damaged, at the latest at the end of the shard."""
