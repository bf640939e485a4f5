"""What stands beside packed shards: `sources.parquet`, which file each key came from, and `rejected.txt`, what was left out and why."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.manifest import DataError

SOURCES_NAME = "sources.parquet"
REJECTED_NAME = "rejected.txt"


def read_sources(folder: str) -> set[str]:
    """The paths that were packed into a split.

    Raises:
        DataError: the file is not there or cannot be read.
    """
    url = storage.join(folder, SOURCES_NAME)
    try:
        return set(pq.read_table(io.BytesIO(storage.read_bytes(url)), columns=["path"]).column("path").to_pylist())
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url}: cannot be read ({str(error).splitlines()[0]}); pack into another out=") from error
