"""`hashes.parquet`: hashes and thumbnails of held-out images, so that selection can exclude copies without reading the images.

One row per image of a split, in its order: `image_hash`, `image_hash_flipped` (of the mirrored image), `thumbnail` (grey), and
`chroma`, the thumbnail's colours. Splits of grey images have no column `chroma`; nor have files of earlier versions, whose images may
have colours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import storage
from ..errors import DataError
from ..shards.split import HASHES_NAME
from ..tables import open_content, open_table, parse_table, write_table_parts
from .decode import Pixels
from .similarity import CHROMA_SIDE, SIDE, chroma, image_hash, thumbnail

_NO_CHROMA = bytes(2 * CHROMA_SIDE**2)
_GREY_SCHEMA = pa.schema(
    [
        pa.field("image_hash", pa.uint64(), nullable=False),
        pa.field("image_hash_flipped", pa.uint64(), nullable=False),
        pa.field("thumbnail", pa.binary(SIDE * SIDE), nullable=False),
    ]
)
_COLOUR_SCHEMA = _GREY_SCHEMA.append(
    pa.field("chroma", pa.binary(len(_NO_CHROMA)))
)  # null: an earlier version packed it

_REMEDY = "copy it again, or pack that split again"


class HeldOutRow(NamedTuple):
    """A row of `hashes.parquet`: one held-out image."""

    image_hash: int
    image_hash_flipped: int
    thumbnail: bytes
    chroma: bytes


@dataclass(frozen=True, eq=False)
class HeldOutHashes:
    """The images of one or several `hashes.parquet`; image i is row `rows[i]` of file `urls[files[i]]`.

    Attributes:
        hashes, hashes_flipped: uint64 (N,).
        thumbnails: uint8 (N, SIDE, SIDE).
        chroma: int8 (N, 2, CHROMA_SIDE, CHROMA_SIDE); see `data.images.similarity.chroma`.
        has_chroma: bool (N,); false: the file has no colours, so `chroma` is 0.
        urls: of the files.
        files: int32 (N,), positions in `urls`.
        rows: int64 (N,), rows in these files.
        digest: hex, of the files' contents in order.
    """

    hashes: NDArray[np.uint64]
    hashes_flipped: NDArray[np.uint64]
    thumbnails: NDArray[np.uint8]
    chroma: NDArray[np.int8]
    has_chroma: NDArray[np.bool_]
    urls: tuple[str, ...]
    files: NDArray[np.int32]
    rows: NDArray[np.int64]
    digest: str


def held_out_row(image: Pixels) -> HeldOutRow:
    """The row of an image, uint8 (H, W, 3)."""
    flipped = np.ascontiguousarray(image[:, ::-1])
    return HeldOutRow(image_hash(image), image_hash(flipped), thumbnail(image).tobytes(), chroma(image).tobytes())


def hash_table(images: Iterable[HeldOutRow]) -> pa.Table:
    """The rows of a `hashes.parquet` as a table, with colours."""
    columns = list(zip(*images, strict=True)) or [()] * len(_COLOUR_SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, _COLOUR_SCHEMA, strict=True)], schema=_COLOUR_SCHEMA)


def write_hashes(folder: str, images: Iterable[HeldOutRow]) -> None:
    """Write `hashes.parquet` beside a split's shards; `images` in the split's order."""
    table = hash_table(images)
    write_hash_tables(folder, lambda: [table])


def write_hash_tables(folder: str, tables: Callable[[], Iterable[pa.Table]]) -> None:
    """As `write_hashes`, from tables with the columns of `hash_table`, which are asked for twice: to look for colours, and to write."""
    schema = _COLOUR_SCHEMA if any(map(_is_coloured, tables())) else _GREY_SCHEMA
    parts = (_with_chroma(table).select(schema.names).cast(schema) for table in tables())
    write_table_parts(storage.join(folder, HASHES_NAME), schema, parts)


def _is_coloured(table: pa.Table) -> bool:
    return any(value not in (None, _NO_CHROMA) for value in _with_chroma(table).column("chroma").to_pylist())


def _with_chroma(table: pa.Table) -> pa.Table:
    """The table, with null as its colours if an earlier version wrote it."""
    if "chroma" in table.column_names:
        return table
    field = _COLOUR_SCHEMA.field("chroma")
    return table.append_column(field, pa.nulls(table.num_rows, field.type))


def is_outdated(folder: str) -> bool:
    """Whether a folder's `hashes.parquet` is of an early version, which had hashes only."""
    url = storage.join(folder, HASHES_NAME)
    if not storage.exists(url):
        return False
    with open_table(url, _REMEDY) as file:
        return not _is_known(file.schema)


def _is_known(schema: pa.Schema) -> bool:
    return schema.remove_metadata() in (_GREY_SCHEMA, _COLOUR_SCHEMA)


def read_held_out_hashes(urls: Sequence[str]) -> HeldOutHashes:
    """Read all held-out images of these files.

    Raises DataError when a file does not exist, has another form, or is of an earlier version; the message says what to do.
    """
    tables, digest = [], hashlib.sha256()
    for url in urls:
        content = _read(url)
        if not _is_known(_schema(content, url)):
            raise DataError(
                f"data.held_out_hashes: {url}: expected the columns {', '.join(_GREY_SCHEMA.names)}, but it has"
                f" {', '.join(_schema(content, url).names)}: an earlier version wrote it. Pack that split again: give the command"
                " that packed it another out=, or remove the split's folder by hand first"
            )
        digest.update(hashlib.sha256(content).digest())
        tables.append(_with_chroma(parse_table(content, url, _REMEDY)))
    table = pa.concat_tables([_COLOUR_SCHEMA.empty_table(), *tables]).combine_chunks()
    sizes = [t.num_rows for t in tables]
    pixels = b"".join(table.column("thumbnail").to_pylist())
    colours = b"".join(value or _NO_CHROMA for value in table.column("chroma").to_pylist())
    return HeldOutHashes(
        hashes=table.column("image_hash").to_numpy(),
        hashes_flipped=table.column("image_hash_flipped").to_numpy(),
        thumbnails=np.frombuffer(pixels, np.uint8).reshape(-1, SIDE, SIDE),
        chroma=np.frombuffer(colours, np.int8).reshape(-1, 2, CHROMA_SIDE, CHROMA_SIDE),
        has_chroma=table.column("chroma").is_valid().to_numpy(),
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
