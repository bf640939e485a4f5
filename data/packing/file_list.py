"""The files of a packing, kept beside its shards, so that a later run notices and names what has changed in the folder.

A folder of Parquet files of `ROWS` rows: `path` below the folder, `size` in bytes, `modified` in nanoseconds, and for labeled images
`copy_of`, the position of the first image with the same bytes, so that a later run need not compare them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice, zip_longest

import numpy as np
import pyarrow as pa

from .. import storage
from ..shards.samples import printable
from ..tables import read_table, write_table
from .groups import Indices
from .listing import Listing, Row

ROWS = 100_000
_SHOWN = 5
_COLUMNS = {"path": pa.binary(), "size": pa.int64(), "modified": pa.int64()}
_NONE = pa.schema(list(_COLUMNS.items())).empty_table()
_REMEDY = "choose another out="


def write_file_list(folder: str, listing: Listing, copy_of: Indices | None) -> None:
    """Write the list. `copy_of`: int64 (N,), or None for unlabeled images."""
    for number, table in enumerate(_tables(listing)):
        start = number * ROWS
        if copy_of is not None:
            table = table.append_column("copy_of", pa.array(copy_of[start : start + table.num_rows]))
        write_table(_part(folder, number), table)


def find_changes(folder: str, count: int, listing: Listing, with_times: bool = True) -> list[str]:
    """What differs between the list of `count` files and the files now: `path (reason)` of the first few; empty for no difference.

    Args:
        with_times: whether another modification time is a difference.
    """
    then = (read_table(_part(folder, number), _REMEDY, list(_COLUMNS)) for number in range(_num_parts(count)))
    now = _tables(listing)
    for before, after in zip_longest(then, now, fillvalue=_NONE):
        if not before.equals(after):
            rows_then, rows_now = (
                chain.from_iterable(map(_rows, chain([part], others)))
                for part, others in ((before, then), (after, now))
            )
            return list(islice(_changes(rows_then, rows_now, with_times), _SHOWN))
    return []


def read_copies(folder: str, count: int) -> Indices:
    """The column `copy_of` of all files: int64 (N,)."""
    parts = [read_table(_part(folder, n), _REMEDY, ["copy_of"]).column(0).to_numpy() for n in range(_num_parts(count))]
    return np.concatenate([np.empty(0, np.int64), *parts])


def has_file_list(folder: str) -> bool:
    """Whether a list was written; earlier versions wrote none."""
    return storage.exists(_part(folder, 0))


def _part(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.parquet")


def _num_parts(count: int) -> int:
    return -(-count // ROWS)


def _tables(listing: Listing) -> Iterator[pa.Table]:
    rows = listing.rows()
    while part := list(islice(rows, ROWS)):
        columns = zip(*part, strict=True)
        yield pa.table(
            [pa.array(column, kind) for column, kind in zip(columns, _COLUMNS.values(), strict=True)], list(_COLUMNS)
        )


def _rows(table: pa.Table) -> Iterator[Row]:
    columns = [table.column(name).to_pylist() for name in _COLUMNS]
    return (Row(*values) for values in zip(*columns, strict=True))


def _changes(then: Iterator[Row], now: Iterator[Row], with_times: bool) -> Iterator[str]:
    """The differences between two lists that are sorted alike; `with_times`: also of modification times alone."""
    before, after = next(then, None), next(now, None)
    while before or after:
        if after is None or (before is not None and _place(before) < _place(after)):
            assert before is not None, "one of two is a row"
            yield f"{_name(before)} (is gone)"
            before = next(then, None)
        elif before is None or _place(after) < _place(before):
            yield f"{_name(after)} (is new)"
            after = next(now, None)
        else:
            if before.size != after.size:
                yield f"{_name(after)} (had {before.size:,} bytes, has {after.size:,})"
            elif with_times and before.modified != after.modified:
                yield f"{_name(after)} (was written since)"
            before, after = next(then, None), next(now, None)


def _place(row: Row) -> list[str]:
    return os.fsdecode(row.name).split("/")


def _name(row: Row) -> str:
    return printable(os.fsdecode(row.name))
