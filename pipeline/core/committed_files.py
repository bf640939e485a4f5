"""Files that a finished stage committed: read whole, and checked against the digests in its done-record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from data import storage
from data.json_files import parse_json
from data.tables import parse_table, read_whole


def read_output(folder: str, name: str, record: Mapping[str, Any] | None, remedy: str) -> bytes:
    """The content of a stage's file.

    Args:
        record: the stage's done-record; None, or one that does not list the file (of an earlier version): any content will do.
        remedy: what to do about another file than was committed; the end of the message.

    Raises:
        DataError: another file is there than was committed.
        FileNotFoundError, StorageError: it cannot be read.
    """
    committed = (record or {}).get("outputs", {}).get(name, {}).get("sha256")
    return read_whole(storage.join(folder, name), committed, remedy)


def read_output_json(
    folder: str, name: str, record: Mapping[str, Any] | None, remedy: str, shape: type[BaseModel] | None = None
) -> dict[str, Any]:
    """As `read_output`, of a JSON object. Raises DataError, too, when it is none, or not of the shape."""
    return parse_json(read_output(folder, name, record, remedy), storage.join(folder, name), remedy, shape)


def read_output_table(
    folder: str, name: str, record: Mapping[str, Any] | None, remedy: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """As `read_output`, of a Parquet file. Raises DataError, too, when it is none, or lacks a column."""
    return parse_table(read_output(folder, name, record, remedy), storage.join(folder, name), remedy, columns)
