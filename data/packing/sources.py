"""What stands beside packed shards: `sources.parquet`, which file each key came from, and `rejected.txt`, what was left out and why."""

from __future__ import annotations

from data import storage
from data.shards.split import DataError
from data.tables import read_table

SOURCES_NAME = "sources.parquet"
REJECTED_NAME = "rejected.txt"


def read_sources(folder: str) -> set[str]:
    """The paths that were packed into a split.

    Raises:
        DataError: the file is not there or cannot be read.
    """
    url = storage.join(folder, SOURCES_NAME)
    remedy = "pack into another out="
    try:
        return set(read_table(url, remedy, ["path"]).column("path").to_pylist())
    except FileNotFoundError as error:
        raise DataError(f"{url}: not there; {remedy}") from error
