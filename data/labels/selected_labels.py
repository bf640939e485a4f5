"""A run's labels with a selection of them, read shard by shard as they were committed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from .. import storage
from ..errors import DataError
from .label_files import LabeledShard, copies_digests, read_copies, read_labels, read_labels_manifest


@dataclass(frozen=True)
class SelectedLabels:
    """Labels, and a selection of them.

    Attributes:
        labels, selection: folders of `<shard name>.parquet`; a selection of None selects nothing.
        labeled: entries of the labels' manifest, by shard name.
        digests: SHA-256 of the selection's files, by shard name.
    """

    labels: str
    selection: str | None
    labeled: Mapping[str, LabeledShard]
    digests: Mapping[str, str]

    @staticmethod
    def of(labels: str, selection: str | None = None, record: Mapping[str, Any] | None = None) -> SelectedLabels:
        """Two folders; `record` is the selection's done-record. Raises DataError when the labels' manifest is damaged."""
        return SelectedLabels(labels, selection, read_labels_manifest(labels), copies_digests(record) if record else {})

    def read(self, shard: str, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """Read columns of a shard's label rows, and `copies`. Raises as `read_labels` and `copies`."""
        rows = read_labels(storage.join(self.labels, f"{shard}.parquet"), columns, self.labeled[shard])
        return rows, self.copies(shard, rows.num_rows)

    def copies(self, shard: str, num_rows: int) -> np.ndarray:
        """How often each of a shard's `num_rows` label rows is used, uint16 [num_rows].

        Raises:
            DataError: the file is damaged, not the committed one, or of another length.
            FileNotFoundError, StorageError: as `storage.read_bytes`.
        """
        if self.selection is None:
            return np.zeros(num_rows, np.uint16)
        url = storage.join(self.selection, f"{shard}.parquet")
        copies = read_copies(url, self.digests.get(shard))
        if len(copies) != num_rows:
            raise DataError(
                f"{url}: expected {num_rows} rows, as in {self.labels}/{shard}.parquet, but got {len(copies)}; run stage=select again"
            )
        return copies
