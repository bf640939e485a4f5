"""Read and write Parquet files so that a changed bit is found when the file is read. The only module that does.

    pages, each with its CRC-32 │ seal: 8 bytes and the SHA-256 of what follows │ footer │ its length │ PAR1

Parquet has checksums for pages only. The seal adds one for the footer, which holds the offsets of pages and the metadata. Readers find
pages by these offsets, so other readers skip the seal. A page's header has no checksum: damage to it makes the decoder fail or lose
rows, so rows are counted.

Files without checksums and seal, from earlier versions or other programs, can be read too.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from . import storage
from .errors import DataError, damaged

_SEAL = b"\x93NSPfoot"
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size
END_OF_FILE = b"PAR1"
_END = 8  # bytes after the footer: its length, and END_OF_FILE
_TAIL = 2**14  # bytes to read first; most footers are shorter
_BUFFER = 2**16  # bytes of a local file to read at once: they stay in a core's cache
_REASON_CHARACTERS = 200
ROWS_AT_ONCE = 2**20  # in a row group, as pyarrow's default


class TableFile:
    """An open Parquet file; see `open_table`."""

    def __init__(self, url: str, file: pq.ParquetFile, is_sealed: bool, num_bytes: int) -> None:
        self.url, self.is_sealed, self.num_bytes = url, is_sealed, num_bytes
        self._file = file

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""
        return self._file.schema_arrow

    @property
    def num_rows(self) -> int:
        """Rows, by the footer."""
        return int(self._file.metadata.num_rows)

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """The schema's metadata."""
        return self.schema.metadata or {}

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read these columns, or all. Raises DataError as `open_table`, and when a column is missing."""
        names = self._names(columns)
        table = self._file.read(columns=names, use_threads=False)
        self._check_rows(table.num_rows)
        return table if columns is None else table.select(names)

    def batches(self, size: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """As `read`, in batches of at most `size` rows."""
        rows = 0
        for batch in self._file.iter_batches(size, columns=self._names(columns), use_threads=False):
            rows += batch.num_rows
            yield batch
        self._check_rows(rows)

    def read_rows(self, start: int, count: int, columns: Sequence[str]) -> pa.Table:
        """As `read`, of `count` rows from `start` on; reads the row groups that have them. Raises also when there are fewer rows."""
        sizes = [self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups)]
        starts = list(accumulate(sizes, initial=0))
        groups = [n for n, size in enumerate(sizes) if starts[n] < start + count and start < starts[n] + size]
        table = self._file.read_row_groups(groups, columns=self._names(columns), use_threads=False)
        if start + count > starts[-1] or table.num_rows != sum(sizes[n] for n in groups):
            raise pa.ArrowInvalid(f"{starts[-1]} rows, and rows up to {start + count} are expected")
        return table.slice(start - starts[groups[0]] if groups else 0, count)

    def _names(self, columns: Sequence[str] | None) -> list[str]:
        known = self.schema.names
        if missing := [name for name in columns or () if name not in known]:
            raise pa.ArrowInvalid(f"it has no column {missing[0]!r}, but {', '.join(known)}")
        return known if columns is None else list(columns)

    def _check_rows(self, found: int) -> None:
        if found != self.num_rows:
            raise pa.ArrowInvalid(f"{found} rows, and {self.num_rows} by its footer")


@contextmanager
def open_table(url: str, remedy: str) -> Iterator[TableFile]:
    """Open a Parquet file to read some of its columns. Verifies the footer and the columns that are read.

    Reads ahead from a store; for a local file that costs more than it saves.

    Args:
        remedy: what to do about a damaged file; ends the message.

    Raises:
        DataError: the file is damaged; also later, from reads in the block.
        FileNotFoundError, StorageError: there is no such file, or it cannot be read.
    """
    is_local = storage.is_local(url)
    with _naming(url, remedy), storage.open_native(url) as stream:
        num_bytes = int(stream.seek(0, 2))
        footer, is_sealed = _read_footer(num_bytes, partial(_read_at, stream))
        with pq.ParquetFile(
            stream,
            metadata=None if is_local else pq.read_metadata(pa.BufferReader(footer)),  # no second request to a store
            pre_buffer=not is_local,
            buffer_size=_BUFFER * is_local,
            page_checksum_verification=True,
        ) as file:
            yield TableFile(url, file, is_sealed, num_bytes)


@contextmanager
def open_content(content: bytes, url: str, remedy: str) -> Iterator[TableFile]:
    """As `open_table`, for a file's content."""
    with _naming(url, remedy):
        _, is_sealed = _read_footer(len(content), lambda start, size: content[start : start + size])
        with pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True) as file:
            yield TableFile(url, file, is_sealed, len(content))


class Footer(NamedTuple):
    """What a Parquet file says of itself.

    Attributes:
        num_rows: as its pages have when they are whole.
        metadata: of the schema.
        is_sealed: whether the footer has a checksum, which was verified.
    """

    num_rows: int
    metadata: Mapping[bytes, bytes]
    is_sealed: bool


def read_footer(url: str, num_bytes: int, remedy: str) -> Footer:
    """Read the footer alone of a file of `num_bytes`: one request to a store, two if it is long. Pages are not verified.

    Raises:
        DataError, FileNotFoundError, StorageError: as `open_table`.
    """
    with _naming(url, remedy):
        footer, is_sealed = _read_footer(num_bytes, partial(storage.read_range, url))
        found = pq.read_metadata(pa.BufferReader(footer))
        return Footer(int(found.num_rows), found.metadata or {}, is_sealed)


def read_table(
    url: str, remedy: str, columns: Sequence[str] | None = None, *, schema: pa.Schema | None = None
) -> pa.Table:
    """Read all rows, verifying the whole file.

    Args:
        schema: columns and types that the file must have; it may have more columns.

    Raises:
        DataError, FileNotFoundError, StorageError: as `open_table`.
    """
    return parse_table(storage.read_bytes(url), url, remedy, columns, schema=schema)


def parse_table(
    content: bytes, url: str, remedy: str, columns: Sequence[str] | None = None, *, schema: pa.Schema | None = None
) -> pa.Table:
    """As `read_table`, for a file's content."""
    with open_content(content, url, remedy) as file:
        _check_schema(file.schema, schema)
        return file.read(columns)


def read_whole(url: str, sha256: str | None, remedy: str) -> bytes:
    """The content of any file. Raises DataError when its SHA-256 is not `sha256` (hex; None: not checked)."""
    content = storage.read_bytes(url)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(damaged(url, "it is not the file that was committed: another SHA-256", remedy))
    return content


def to_parquet(table: pa.Table, **layout: Any) -> bytes:
    """The bytes of a Parquet file with checksums and seal. `layout`: options of `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, **({"compression": "zstd"} | layout))
    content = sink.getvalue().to_pybytes()
    start = len(content) - _END - int.from_bytes(content[-_END:-4], "little")
    return b"".join([content[:start], *_sealed(content[start:])])


def write_table(url: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    storage.write_bytes(url, to_parquet(table))


def write_table_parts(url: str, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write a Parquet file of which memory holds `ROWS_AT_ONCE` rows. The bytes are those of `write_table` for the whole table."""
    with storage.writing(url) as file:
        sink = _FooterHeldBack(file)
        with pq.ParquetWriter(pa.PythonFile(sink, "w"), schema, compression="zstd", write_page_checksum=True) as writer:
            for part in _regrouped(schema, parts):
                writer.write_table(part, ROWS_AT_ONCE)
            sink.is_held = True
        content = bytes(sink.held)
        start = len(content) - _END - int.from_bytes(content[-_END:-4], "little")
        file.write(b"".join([content[:start], *_sealed(content[start:])]))


class _FooterHeldBack(io.RawIOBase):
    """Pass on what is written; keep it in `held` from the moment when `is_held` is set."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.is_held, self.held = file, False, bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        if self.is_held:
            self.held += content
            return len(content)
        return self._file.write(content)


def _regrouped(schema: pa.Schema, parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROWS_AT_ONCE, the last with fewer; one empty table for no rows."""
    pending, is_empty = schema.empty_table(), True
    for part in parts:
        pending = pa.concat_tables([pending, part])
        while pending.num_rows >= ROWS_AT_ONCE:
            yield pending[:ROWS_AT_ONCE].combine_chunks()
            pending, is_empty = pending[ROWS_AT_ONCE:], False
    if pending.num_rows or is_empty:
        yield pending.combine_chunks()


def _sealed(footer: bytes) -> tuple[bytes, ...]:
    """The seal of a footer, and the footer."""
    return _SEAL, hashlib.sha256(footer).digest(), footer


def _read_footer(size: int, read: Callable[[int, int], bytes]) -> tuple[bytes, bool]:
    """The footer and what follows it; whether it is sealed. Raises ArrowInvalid for a damaged one.

    Args:
        size: bytes of the file.
        read: offset and number of bytes → these bytes of the file.
    """
    tail = _tail(size, _TAIL, read)
    wanted = int.from_bytes(tail[-_END:-4], "little") + _END
    if size <= _END or not tail.endswith(END_OF_FILE) or wanted > size:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    if wanted + _SEAL_BYTES > len(tail):
        tail = _tail(size, wanted + _SEAL_BYTES, read)
    footer, before = tail[-wanted:], tail[: len(tail) - wanted]
    seal = before[-_SEAL_BYTES:]
    is_sealed = seal.startswith(_SEAL)
    if is_sealed and seal[len(_SEAL) :] != hashlib.sha256(footer).digest():
        raise pa.ArrowInvalid("the checksum of its footer differs")
    return footer, is_sealed


def _tail(size: int, wanted: int, read: Callable[[int, int], bytes]) -> bytes:
    start = max(0, size - wanted)
    return read(start, size - start)


def _read_at(stream: Any, start: int, size: int) -> bytes:
    stream.seek(start)
    return bytes(stream.read(size))


def _check_schema(found: pa.Schema, expected: pa.Schema | None) -> None:
    for field in expected or ():
        kind = found.field(field.name).type if field.name in found.names else "missing"
        if kind != field.type:
            raise pa.ArrowInvalid(f"column {field.name!r}: expected {field.type}, but it is {kind}")


@contextmanager
def _naming(url: str, remedy: str) -> Iterator[None]:
    """Turn errors of pyarrow into DataErrors that name the file; add the file's name to OSErrors."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: column names in a footer without seal
        if isinstance(error, OSError) and error.errno is not None:  # from the operating system
            error.filename = error.filename or url
            raise
        raise DataError(damaged(url, " ".join(str(error).split())[:_REASON_CHARACTERS], remedy)) from error
