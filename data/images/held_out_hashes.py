"""`hashes.parquet`: hashes and thumbnails of held-out images, so that selection can exclude copies without reading the images.

One row per image of a split, in its order: `image_hash`, `image_hash_flipped` (of the mirrored image), `thumbnail`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import storage
from ..errors import DataError
from ..shards.split import HASHES_NAME
from ..tables import open_content, open_table, parse_table, write_table
from .decode import Pixels
from .similarity import SIDE, image_hash, thumbnail

HASH_SCHEMA = pa.schema(
    [
        pa.field("image_hash", pa.uint64(), nullable=False),
        pa.field("image_hash_flipped", pa.uint64(), nullable=False),
        pa.field("thumbnail", pa.binary(SIDE * SIDE), nullable=False),
    ]
)

_REMEDY = "copy it again, or pack that split again"


class HeldOutRow(NamedTuple):
    """A row of `hashes.parquet`: one held-out image."""

    image_hash: int
    image_hash_flipped: int
    thumbnail: bytes


@dataclass(frozen=True, eq=False)
class HeldOutHashes:
    """The images of one or several `hashes.parquet`; image i is row `rows[i]` of file `urls[files[i]]`.

    Attributes:
        hashes, hashes_flipped: uint64 (N,).
        thumbnails: uint8 (N, SIDE, SIDE).
        urls: of the files.
        files: int32 (N,), positions in `urls`.
        rows: int64 (N,), rows in these files.
        digest: hex, of the files' contents in order.
    """

    hashes: NDArray[np.uint64]
    hashes_flipped: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    urls: tuple[str, ...]
    files: NDArray[np.int32]
    rows: NDArray[np.int64]
    digest: str


def held_out_row(image: Pixels) -> HeldOutRow:
    """The row of an image, uint8 (H, W, 3)."""
    flipped = np.ascontiguousarray(image[:, ::-1])
    return HeldOutRow(image_hash(image), image_hash(flipped), thumbnail(image).tobytes())


def hash_table(images: Iterable[HeldOutRow]) -> pa.Table:
    """The rows of a `hashes.parquet` as a table."""
    columns = list(zip(*images, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, HASH_SCHEMA, strict=True)], schema=HASH_SCHEMA)


def write_hashes(folder: str, images: Iterable[HeldOutRow]) -> None:
    """Write `hashes.parquet` beside a split's shards; `images` in the split's order."""
    write_table(storage.join(folder, HASHES_NAME), hash_table(images))


def is_outdated(folder: str) -> bool:
    """Whether a folder's `hashes.parquet` is of an earlier version, which had hashes only."""
    url = storage.join(folder, HASHES_NAME)
    if not storage.exists(url):
        return False
    with open_table(url, _REMEDY) as file:
        return not file.schema.remove_metadata().equals(HASH_SCHEMA)


def read_held_out_hashes(urls: Sequence[str]) -> HeldOutHashes:
    """Read all held-out images of these files.

    Raises DataError when a file does not exist, has another form, or is of an earlier version; the message says what to do.
    """
    tables, digest = [], hashlib.sha256()
    for url in urls:
        content = _read(url)
        if not _schema(content, url).equals(HASH_SCHEMA):
            raise DataError(
                f"data.held_out_hashes: {url}: expected the columns {', '.join(HASH_SCHEMA.names)}, but it has"
                f" {', '.join(_schema(content, url).names)}: an earlier version wrote it. Pack that split again: give the command"
                " that packed it another out=, or remove the split's folder by hand first"
            )
        digest.update(hashlib.sha256(content).digest())
        tables.append(parse_table(content, url, _REMEDY))
    table = pa.concat_tables([HASH_SCHEMA.empty_table(), *tables]).combine_chunks()
    sizes = [t.num_rows for t in tables]
    pixels = b"".join(table.column("thumbnail").to_pylist())
    return HeldOutHashes(
        hashes=table.column("image_hash").to_numpy(),
        hashes_flipped=table.column("image_hash_flipped").to_numpy(),
        thumbnails=np.frombuffer(pixels, np.uint8).reshape(-1, SIDE, SIDE),
        urls=tuple(urls),
        files=np.repeat(np.arange(len(urls), dtype=np.int32), sizes),
        rows=np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)]),
        digest=digest.hexdigest()[:16],
    )


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError as error:
        raise DataError(
            f"data.held_out_hashes: {url} is not there; data.pack writes it beside labeled shards"
        ) from error


def _schema(content: bytes, url: str) -> pa.Schema:
    try:
        with open_content(content, url, _REMEDY) as file:
            return file.schema.remove_metadata()
    except DataError as error:
        raise DataError(
            f"data.held_out_hashes: {url}: expected a {HASHES_NAME} as data.pack writes it ({error})"
        ) from error
