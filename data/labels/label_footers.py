"""Read what label files say of themselves from their footers alone, many at once: a hundredth of the time that reading them takes.

A footer names the shard, its index, who made the labels, and the quarantined samples. It has a checksum of its own (`data.tables`), but
says nothing about damage to the rows, nor the file's SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import pyarrow as pa

from .. import storage
from ..errors import DataError
from ..tables import read_footer
from .label_files import (
    LABELS_REMEDY,
    LabeledShard,
    Quarantined,
    check_source,
    describe,
    quarantine_table,
    quarantined_in,
    read_labels,
    read_quarantined,
)


def describe_by_footers(folder: str, sizes: Mapping[str, int]) -> Iterator[LabeledShard | None]:
    """Entries of the labels' manifest, without `sha256`, in order; None for a file that is damaged, gone or no label file.

    Args:
        sizes: file name → bytes, from a listing of `folder`.

    Raises:
        StorageError: the store does not answer.
    """

    def read(name: str) -> LabeledShard | None:
        url = storage.join(folder, name)
        try:
            footer = read_footer(url, sizes[name], "")
            return describe(url, footer.num_rows, footer.metadata, sizes[name], sha256="")
        except (DataError, LookupError, FileNotFoundError):  # LookupError: a Parquet file without our metadata
            return None

    return storage.in_parallel(read, sizes)


def read_all_quarantined(folder: str, entries: Iterable[LabeledShard]) -> pa.Table:
    """The quarantined samples of the label files that `entries` describe, as `quarantine_table`.

    Raises:
        DataError: a file is damaged, or not the one that its entry describes.
        FileNotFoundError, StorageError: a file is missing, or the store does not answer.
    """

    def read(entry: LabeledShard) -> list[Quarantined]:
        url = storage.join(folder, f"{entry.name}.parquet")
        footer = read_footer(url, entry.bytes, LABELS_REMEDY)
        if not footer.is_sealed:  # of an earlier version: only the digest of the whole file tells whether it is damaged
            return read_quarantined(read_labels(url, ["ordinal"], entry), url)
        check_source(url, footer.metadata, entry)
        return quarantined_in(footer.metadata, url)

    with_rows = [entry for entry in entries if entry.quarantined]
    return quarantine_table([row for rows in storage.in_parallel(read, with_rows) for row in rows])
