"""Find out which sample some bytes in a tar belong to, from the headers directly in front of them.

A plain header is one block. Names that are long or not ASCII have extended headers (pax, GNU) before it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

from .samples import is_member_of, printable
from .tar import BLOCK
from .tar_reader import pax_records

MAX_FRONT = 128 * BLOCK  # bytes searched for extended headers
_EXTENDED_FRONT = 8 * BLOCK  # enough for the extended headers of nearly all names
_MAX_PLAIN_KEY = 90  # characters; with an extension it fits the 100 bytes of a plain header
_NAME_BYTES, _SIZE, _TYPE, _PREFIX = 100, slice(124, 136), 156, 345
_PAX, _GNU_LONG_NAME, _OTHER_EXTENDED = b"xX", b"L", b"gK"


def bytes_in_front(key: str) -> int:
    """Bytes to read in front of an image to identify it: one block, or more where its name needs extended headers."""
    return BLOCK if len(key) <= _MAX_PLAIN_KEY and key.isascii() else _EXTENDED_FRONT


def is_in_front(front: bytes, key: str, size: int) -> bool:
    """Whether `front` ends with the header of a member of the sample `key` with `size` bytes. Takes a microsecond for plain names."""
    start = f"{key}.".encode()
    header = front[-BLOCK:]
    if header.startswith(start) and len(header) == BLOCK and not header[_PREFIX]:
        rest = header[len(start) : _NAME_BYTES].partition(b"\0")[0]
        if b"/" not in rest and header[_SIZE] == b"%011o\0" % size:
            return True
    names, found = _describe(front)
    return any(is_member_of(name, key) for name in names) and found in (size, None)


def describe_front(front: bytes) -> str:
    """Name and size in the header at the end of `front`, for messages."""
    names, size = _describe(front)
    return f"{names[-1]!r}" + (f" with {size} bytes" if size is not None else "") if names else "no tar header"


def _describe(front: bytes) -> tuple[list[str], int | None]:
    """The member's names by its own header and by extended ones; its size in bytes, None where an extended header may give another."""
    own = _header(front, len(front) - BLOCK)
    if own is None:
        return [], None
    extended = list(_extended_names(front))
    return [printable(name) for name in (own.name, *filter(None, extended))], None if extended else own.size


def _extended_names(front: bytes) -> Iterator[str]:
    """The name in each extended header of the member, or an empty text; the nearest first."""
    ends = {len(front) - BLOCK}  # where an extended header may end
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
    except tarfile.TarError:  # no header: wrong checksum
        return None
    return found if found.size >= 0 else None


def _pax_path(content: bytes) -> bytes:
    """The path in a pax header; empty when it has none or is damaged."""
    try:
        return pax_records(content).get(b"path", b"")
    except ValueError:
        return b""
