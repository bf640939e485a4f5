"""Read files of finished stages, and check them against the digests in the done-record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from data import storage
from data.json_files import parse_json
from data.tables import parse_table, read_whole


def read_output(folder: str, name: str, record: Mapping[str, Any] | None, remedy: str) -> bytes:
    """Read a stage's file.

    Args:
        record: the stage's done-record. If it is None, or does not list the file (earlier versions), any content is accepted.
        remedy: the end of the message: what to do about a file that was not committed.

    Raises:
        DataError: the file is not the one that was committed.
        FileNotFoundError, StorageError: the file cannot be read.
    """
    committed = (record or {}).get("outputs", {}).get(name, {}).get("sha256")
    return read_whole(storage.join(folder, name), committed, remedy)


def read_output_json(
    folder: str, name: str, record: Mapping[str, Any] | None, remedy: str, shape: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Read a stage's file as a JSON object. Raises what `read_output` raises, and DataError when it is not one of the shape."""
    return parse_json(read_output(folder, name, record, remedy), storage.join(folder, name), remedy, shape)


def read_output_table(
    folder: str, name: str, record: Mapping[str, Any] | None, remedy: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a stage's file as Parquet. Raises what `read_output` raises, and DataError when it is not one, or lacks a column."""
    return parse_table(read_output(folder, name, record, remedy), storage.join(folder, name), remedy, columns)
