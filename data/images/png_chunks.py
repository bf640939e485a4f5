"""Read a PNG's chunks, and unpack long compressed text, for which Pillow would refuse the image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

PNG = b"\x89PNG\r\n\x1a\n"
COMPRESSED = frozenset((b"iCCP", b"iTXt", b"zTXt"))
MAX_TEXT = 64 * 1024 * 1024
"""Bytes of unpacked text in one file. Pillow has the same limit for text that is not compressed."""


def chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end of data) of each chunk, up to the end of the image or the last complete header."""
    at = len(PNG)
    while at + 8 <= len(content):
        kind, start = content[at + 4 : at + 8], at + 8
        end = start + int.from_bytes(content[at : at + 4], "big")
        yield kind, start, end
        if kind == b"IEND":
            return
        at = end + 4


def with_long_text_unpacked(content: bytes) -> bytes:
    """The PNG with compressed text that is too long for Pillow stored uncompressed, and colour profiles that are too long left out.

    Text beyond MAX_TEXT stays compressed, so that Pillow refuses the image. Returns the same object when there is nothing to change.
    """
    pieces, done, room = list[bytes](), 0, MAX_TEXT
    for kind, start, end in chunks(content):
        data = memoryview(content)[start:end]
        plain = _plain(kind, data.tobytes(), room) if kind in COMPRESSED else None
        if plain is None or content[end : end + 4] != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
            continue
        pieces += content[done : start - 8], plain
        room, done = room - len(plain), end + 4
    return b"".join(pieces) + content[done:] if pieces else content


def _plain(kind: bytes, data: bytes, room: int) -> bytes | None:
    """The replacement for a chunk; None to keep it."""
    keyword, _, rest = data.partition(b"\0")
    if kind == b"iTXt":
        if rest[:2] != b"\1\0" or rest.count(b"\0", 2) < 2:  # not compressed, or not readable
            return None
        language, translated, rest = rest[2:].split(b"\0", 2)
        keyword += b"\0\0\0" + language + b"\0" + translated
    else:
        rest = rest[1:]
    if not _is_long(rest):
        return None
    if kind == b"iCCP":
        return b""
    try:
        text = zlib.decompressobj().decompress(rest, room + 1)
    except zlib.error:  # damaged further on; Pillow would drop such text too
        return b""
    if len(text) > room:
        return None
    return _chunk(b"iTXt" if kind == b"iTXt" else b"tEXt", keyword + b"\0" + text)


def _is_long(data: bytes) -> bool:
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(data, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:
        return False
    return bool(unpacking.unconsumed_tail)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
