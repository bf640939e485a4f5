"""Read the members of a tar from its headers, like Python's `tarfile` for a good archive, and fail early for any other.

`tarfile` follows extended headers by recursion, reads each whole whatever size it claims, searches it in quadratic time, and copies
global ones for every member. Here everything has a limit, and time and memory grow only with the file's bytes.

Formats: POSIX ustar and pax, GNU long names and sparse files (https://www.gnu.org/software/tar/manual/html_node/Standard.html;
pax: POSIX.1-2017, "pax Interchange Format").
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from .tar import BLOCK

MAX_EXTENDED_BYTES = 1 << 20  # of one extended header; names have at most 4 kB, extended attributes 64 kB each
MAX_EXTENDED_HEADERS = 8  # before one member; pax, global pax, long name and long link make four
_MAX_SIZE = (1 << 63) - 1
_MAX_ZEROS = (1 << 20) + 2 * BLOCK  # bytes at the end of an archive, which is filled to a whole record, mostly of 10 kB
_ZEROS = bytes(BLOCK)
_CHECKSUM = slice(148, 156)
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_PAX, _GLOBAL_PAX, _SOLARIS_PAX = b"x", b"g", b"X"
_EXTENDED = (_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL_PAX, _SOLARIS_PAX)
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever their size field
_NOT_FILES = (b"5", b"D", b"V")  # folders, GNU's lists of files in them, volume labels

_ANOTHER = " (another tar: split the file there with head -c and tail -c, or unpack it with tar --ignore-zeros and pack it again)"


class DamagedTarError(Exception):
    """A damaged tar. `position`: the byte after the last good member, or the end of the file."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(what)
        self.position = position


class Member(NamedTuple):
    """One member; `offset` and `size` of its content in bytes."""

    name: str  # undecodable bytes are lone surrogates
    offset: int
    size: int
    is_file: bool  # a file or a link to one, not a folder
    is_plain: bool  # a regular file whose content is at `offset`: no link, sparse file or device


@dataclass
class _Extension:
    """Facts from extended headers about the next member; of several headers the first counts, as in `tarfile`."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members in order, folders included.

    The last one may reach beyond the end of the file; the error comes after it. Raises DamagedTarError when the file is cut short
    or damaged, is no tar, or several tars.
    """
    end = file.seek(0, io.SEEK_END)
    if not end:
        raise DamagedTarError("empty file", 0)
    position = 0
    while (block := _read_block(file, position, end)) != _ZEROS:
        try:
            member, position = _read_member(file, position, block)
        except ValueError as error:
            raise DamagedTarError(str(error), position) from error
        yield member
        if position > end:
            raise DamagedTarError("unexpected end of data", end)
    _check_rest(file, position)


def _read_block(file: BinaryIO, position: int, end: int) -> bytes:
    """The header block at `position`; zeros at the end of the archive. Raises DamagedTarError."""
    block = _read(file, position, BLOCK)
    if len(block) == BLOCK and (block == _ZEROS or _has_checksum(block)):
        return block
    if position == 0:
        raise DamagedTarError("invalid header" if len(block) == BLOCK else "truncated header", 0)
    if len(block) < BLOCK:
        raise DamagedTarError("no end-of-archive marker", min(position, end))
    raise DamagedTarError("a damaged header", position)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _has_checksum(block: bytes) -> bool:
    """Whether a header's checksum is right, also as a sum of signed bytes (some old programs)."""
    try:
        expected = _number(block[_CHECKSUM])
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if expected == unsigned:
        return True
    others = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    return expected == unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """A number in a header: octal digits, or big-endian after a byte of 0x80 (0xff: negative). Raises ValueError."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    digits = field.partition(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):
        raise ValueError(f"a header field is no number: {field!r}")
    return int(digits, 8)


def _read_member(file: BinaryIO, position: int, block: bytes) -> tuple[Member, int]:
    """The member whose first header is `block`, and the position of the next one. Raises ValueError."""
    extension = _Extension()
    headers = 0
    while (kind := block[156:157]) in _EXTENDED:
        headers += 1
        if headers > MAX_EXTENDED_HEADERS:
            raise ValueError(f"more than {MAX_EXTENDED_HEADERS} extended headers before one member")
        size = _number(block[124:136])
        if not 0 <= size <= MAX_EXTENDED_BYTES:
            raise ValueError(f"an extended header of {size} bytes, more than the {MAX_EXTENDED_BYTES} allowed")
        content = _read(file, position + BLOCK, size)
        if len(content) < size:
            raise ValueError("unexpected end of data")
        _extend(extension, kind, content)
        position += BLOCK + _padded(size)
        block = _read(file, position, BLOCK)
        if len(block) < BLOCK or not _has_checksum(block):
            raise ValueError("an extended header without a member behind it")
    return _member(file, position, block, extension)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extend(extension: _Extension, kind: bytes, content: bytes) -> None:
    if kind == _LONG_NAME and extension.name is None:
        extension.name = _text(content)
    elif kind not in (_LONG_NAME, _LONG_LINK):
        records = pax_records(content)
        is_sparse = any(key.startswith(b"GNU.sparse.") for key in records)
        if kind == _GLOBAL_PAX:
            if is_sparse or b"path" in records or b"size" in records:
                raise ValueError("a global header with a path or a size, which no two members share")
            return
        extension.is_sparse |= is_sparse
        name = records.get(b"GNU.sparse.name", records.get(b"path"))
        if name is not None and extension.name is None:
            extension.name = name.decode("utf-8", "surrogateescape").rstrip("/")
        if (size := records.get(b"size")) is not None and extension.size is None:
            if not size.isdigit() or len(size) > len(str(_MAX_SIZE)):
                raise ValueError(f"a pax size that is no number: {size[:20]!r}")
            extension.size = int(size)


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """Key → value of a pax header's records, `LENGTH KEY=VALUE\\n` each. Raises ValueError."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position]:  # some programs pad with zeros
        space = content.find(b" ", position, position + len(str(MAX_EXTENDED_BYTES)) + 1)
        digits = content[position : max(space, position)]
        stop = position + int(digits) if digits.isdigit() else -1
        key, equals, value = content[space + 1 : max(stop - 1, 0)].partition(b"=")
        if not space < stop <= len(content) or not equals or content[stop - 1] != ord("\n"):
            raise ValueError("a damaged pax header")
        records[key] = value
        position = stop
    return records


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _member(file: BinaryIO, position: int, block: bytes, extension: _Extension) -> tuple[Member, int]:
    """The member with the header `block` at `position`, and the position of the next one. Raises ValueError."""
    kind, stored, offset = block[156:157], _number(block[124:136]), position + BLOCK
    name = _text(block[:100])
    is_file = kind not in _NOT_FILES and not (kind == b"\0" and name.endswith("/"))
    if kind == _SPARSE:
        offset = _skip_sparse_map(file, offset, block[482])
    elif prefix := _text(block[345:500]):
        name = f"{prefix}/{name}"
    size = stored if extension.size is None else extension.size
    if not 0 <= size <= _MAX_SIZE:  # a negative size would make the reader loop forever
        raise ValueError(f"a member of {size} bytes")
    is_plain = kind in _REGULAR and is_file and not extension.is_sparse
    found = Member(name if extension.name is None else extension.name, offset, size, is_file, is_plain)
    is_content = kind not in _WITHOUT_CONTENT and (is_file or kind != b"\0")
    return found, offset + (_padded(size) if is_content else 0)


def _skip_sparse_map(file: BinaryIO, offset: int, is_extended: int) -> int:
    """The position of an old GNU sparse file's content. Raises ValueError."""
    while is_extended:
        block = _read(file, offset, BLOCK)
        if len(block) < BLOCK:
            raise ValueError("unexpected end of data")
        is_extended = block[504]
        offset += BLOCK
    return offset


def _check_rest(file: BinaryIO, position: int) -> None:
    """Raise DamagedTarError when data follows the end of the archive, as in several tars joined, or too many zeros, as in a
    preallocated file that was not written to its end."""
    file.seek(position)
    while chunk := file.read(1 << 20):
        if rest := chunk.lstrip(b"\0"):
            start = file.tell() - len(rest)
            block = _read(file, start, BLOCK)
            is_tar = start % BLOCK == 0 and len(block) == BLOCK and _has_checksum(block)
            raise DamagedTarError(f"more data after the end-of-archive marker{_ANOTHER if is_tar else ''}", start)
    if (zeros := file.tell() - position) > _MAX_ZEROS:
        raise DamagedTarError(f"{zeros} bytes of zeros at the end, as of a copy that is not complete", position)
