"""What every source of pseudo-labels gives: samples, shard by shard, and the same labels as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

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
