"""Write the copies of every label row: a file with one column `copies` beside every label file, aligned with its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.label_files import COPIES_COLUMN
from data.tables import to_parquet
from teacher.executors import ONE_THREAD, Executor
from teacher.selection.label_reader import LabelRows, either
from teacher.selection.quota_search import Selection
from teacher.selection.rule import Cutoffs, Int64, SelectError, UInt16

_SCHEMA = pa.schema([pa.field(COPIES_COLUMN, pa.uint16(), nullable=False)])
# four times faster than zstd with a dictionary, and half a byte per row instead of a quarter
_LAYOUT = {"compression": "lz4", "use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT"}
WriteFile = Callable[[str], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class ShardCounts:
    """Label rows of a shard by outcome: `rows` = `kept` + the five reasons; a row counts for the first reason that applies."""

    rows: int
    kept: int
    copies: int
    held_out_duplicate: int
    excluded_by_user: int
    below_threshold: int
    near_duplicate: int  # look-alikes (`LabelRows.look_alike`)
    over_quota: int


def write_all_copies(
    selection: Selection, shards: Sequence[str], out_dir: str, executor: Executor = ONE_THREAD
) -> dict[str, ShardCounts]:
    """Write the copies of all shards; return their counts, in the order of `shards`.

    Raises SelectError when the totals differ from the selection's: label files or shards changed since it was made.
    """
    written: dict[str, ShardCounts] = {}
    for part in executor(partial(_write_shards, selection, out_dir), shards, "write"):
        written |= part
    found = sum(counts.kept for counts in written.values()), sum(counts.copies for counts in written.values())
    expected = int(selection.cutoffs.kept.sum()), int(selection.cutoffs.copies.sum())
    if found != expected:
        raise SelectError(
            f"{selection.source.labels_dir}: expected {expected[0]} images kept and {expected[1]} copies but got {found[0]} and"
            f" {found[1]}: the label files are not those of the selection; select again"
        )
    return {shard: written[shard] for shard in shards}


def _write_shards(selection: Selection, out_dir: str, shards: Iterable[str]) -> dict[str, ShardCounts]:
    # together: an interrupted selection starts over, so no file has to be committed before the others
    with storage.writing_together() as writing:
        return {
            shard: write_copies(
                storage.join(out_dir, f"{shard}.parquet"), batches, partial(_copies, selection.cutoffs, shard), writing
            )
            for shard, batches in selection.source.read_all(shards)
        }


def write_copies(
    url: str, batches: Iterable[LabelRows], copies_of: Callable[[LabelRows], UInt16], writing: WriteFile
) -> ShardCounts:
    """Write a shard's copies, atomically. Raises SelectError as `LabelSource.read`.

    Args:
        batches: all rows of the shard.
        copies_of: gives the copies of each batch, uint16 [n].
        writing: opens a file to write, as `storage.writing`.
    """
    counts = np.zeros(len(ShardCounts.__dataclass_fields__), np.int64)
    parts = [np.empty(0, np.uint16)]
    for rows in batches:
        parts.append(copies_of(rows))
        counts += _count(rows, parts[-1])
    column = np.concatenate(parts)
    array = pa.Array.from_buffers(pa.uint16(), len(column), [None, pa.py_buffer(column)])  # `pa.array` imports pandas
    content = to_parquet(pa.table([array], schema=_SCHEMA), **_LAYOUT)
    with writing(url) as file:
        file.write(content)
    return ShardCounts(*counts.tolist())


def _copies(cutoffs: Cutoffs, shard: str, rows: LabelRows) -> UInt16:
    assert rows.ordinal is not None
    copies = cutoffs.copies_of(shard, rows.label, rows.key, rows.ordinal)
    copies *= rows.eligible
    return copies


def _count(rows: LabelRows, copies: UInt16) -> Int64:
    """The fields of ShardCounts, in order, int64 [8]."""
    left_out, so_far = None, [0]
    for mask in (rows.held_out, rows.by_user, ~rows.above, rows.look_alike):
        left_out = either(left_out, mask)
        so_far.append(0 if left_out is None else int(np.count_nonzero(left_out)))
    number, kept = len(copies), np.count_nonzero(copies)
    return np.array([number, kept, copies.sum(dtype=np.int64), *np.diff(so_far), number - kept - so_far[-1]])
