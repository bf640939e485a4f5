"""Whose bytes are these? The headers directly in front of a member's bytes in a tar, read backwards from the bytes.

A plain header is one block. Long names and names beyond ASCII have extended headers (pax, GNU) in front of it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from data.shards.samples import is_member_of, printable
from data.shards.tar import BLOCK
from data.shards.tar_reader import pax_records

MAX_FRONT = 128 * BLOCK  # extended headers further in front are not looked for
_EXTENDED_FRONT = 8 * BLOCK  # holds the extended headers of nearly all names that need them
_MAX_PLAIN_KEY = 90  # characters; with an extension it fits the 100 bytes of a plain header
_NAME_BYTES, _SIZE, _TYPE, _PREFIX = 100, slice(124, 136), 156, 345
_PAX, _GNU_LONG_NAME, _OTHER_EXTENDED = b"xX", b"L", b"gK"


def bytes_in_front(key: str) -> int:
    """Bytes to read in front of an image to know whose it is: a block, or more where its name needs extended headers."""
    return BLOCK if len(key) <= _MAX_PLAIN_KEY and key.isascii() else _EXTENDED_FRONT


def is_in_front(front: bytes, key: str, size: int) -> bool:
    """Whether `front` ends with the header of a member of the sample `key` that has `size` bytes; to be had for a microsecond."""
    start = f"{key}.".encode()
    header = front[-BLOCK:]
    if header.startswith(start) and len(header) == BLOCK and not header[_PREFIX]:
        rest = header[len(start) : _NAME_BYTES].partition(b"\0")[0]
        if b"/" not in rest and header[_SIZE] == b"%011o\0" % size:
            return True
    names, found = _describe(front)
    return any(is_member_of(name, key) for name in names) and found in (size, None)


def describe_front(front: bytes) -> str:
    """What the header at the end of `front` is of, for messages."""
    names, size = _describe(front)
    return f"{names[-1]!r}" + (f" with {size} bytes" if size is not None else "") if names else "no tar header"


def _describe(front: bytes) -> tuple[list[str], int | None]:
    """Names that the member has by its own header and by extended ones; its bytes, None where an extended one may say others."""
    own = _header(front, len(front) - BLOCK)
    if own is None:
        return [], None
    extended = list(_extended_names(front))
    return [printable(name) for name in (own.name, *filter(None, extended))], None if extended else own.size


def _extended_names(front: bytes) -> Iterator[str]:
    """Of each extended header that belongs to the member, the nearest first: the name in it, or nothing."""
    ends = {len(front) - BLOCK}  # where an extended header has to end
    for start in range(len(front) - 2 * BLOCK, -1, -BLOCK):
        kind = front[start + _TYPE : start + _TYPE + 1]
        if not kind or kind not in _PAX + _GNU_LONG_NAME + _OTHER_EXTENDED:
            continue
        header = _header(front, start)
        if header is None or start + BLOCK + -(-header.size // BLOCK) * BLOCK not in ends:
            continue
        ends.add(start)
        content = front[start + BLOCK : start + BLOCK + header.size]
        name = _pax_path(content) if kind in _PAX else content.partition(b"\0")[0] if kind == _GNU_LONG_NAME else b""
        yield name.decode("utf-8", "surrogateescape").rstrip("/")


def _header(front: bytes, start: int) -> tarfile.TarInfo | None:
    if start < 0:
        return None
    try:
        found = tarfile.TarInfo.frombuf(front[start : start + BLOCK], "utf-8", "surrogateescape")
    except tarfile.TarError:  # its checksum is wrong: no header
        return None
    return found if found.size >= 0 else None


def _pax_path(content: bytes) -> bytes:
    """The path in a pax header; empty without one, or where the header is damaged."""
    try:
        return pax_records(content).get(b"path", b"")
    except ValueError:
        return b""
