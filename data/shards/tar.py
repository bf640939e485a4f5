"""Make tar members as bytes: the same as `tarfile` (ustar, no owner, no time), in a fraction of the time.

The bytes follow from name and size, so an archive's layout is known before it is written, and any range of it can be made by itself.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

BLOCK = tarfile.BLOCKSIZE
_MAX_PLAIN_NAME = 100  # characters; fits a ustar header unchanged
_PLAIN_NAME = re.compile(rf"[!-~]{{1,{_MAX_PLAIN_NAME}}}")
_MAX_PLAIN_SIZE = 8**11 - 1
_SIZE, _CHECKSUM = slice(124, 135), slice(148, 156)
_MODE = 0o644


def _template() -> bytes:
    header = bytearray(_tar_info("", 0).tobuf(tarfile.USTAR_FORMAT))
    header[_CHECKSUM] = b" " * 8  # the checksum is computed with blanks here
    return bytes(header)


def _tar_info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, _MODE
    return info


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(b"%011o" % 0)


def member_header(name: str, size: int) -> bytes:
    """The header blocks of a regular file, with a pax header first for a name that ustar cannot hold.

    Args:
        size: bytes of the file.
    """
    if size > _MAX_PLAIN_SIZE or not _PLAIN_NAME.fullmatch(name) or name.endswith("/"):
        return _tar_info(name, size).tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")
    encoded, octal = name.encode("ascii"), b"%011o" % size
    checksum = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(octal))
    parts = encoded, _TEMPLATE[len(encoded) : 124], octal, _TEMPLATE[135:148], checksum, _TEMPLATE[156:]
    return b"".join(parts)


def member_headers(names: Sequence[str], sizes: Sequence[int]) -> list[bytes]:
    """`member_header` of many files at once, which takes a third of the time."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    text = np.array(encoded, np.bytes_)[:, None].view(np.uint8)
    is_printable = (text >= ord("!")) & (text <= ord("~"))
    if (
        is_printable.sum() != sum(map(len, encoded))
        or text.shape[1] > _MAX_PLAIN_NAME
        or max(sizes, default=0) > _MAX_PLAIN_SIZE
        or any(name.endswith(b"/") or not name for name in encoded)
    ):
        return list(map(member_header, names, sizes))
    octal = _octal(np.array(sizes, np.int64), 11)
    headers = np.tile(np.frombuffer(_TEMPLATE, np.uint8), (len(names), 1))
    headers[:, : text.shape[1]], headers[:, _SIZE] = text, octal
    sums = _TEMPLATE_SUM + text.sum(axis=1, dtype=np.int64) + octal.sum(axis=1, dtype=np.int64)
    headers[:, _CHECKSUM.start : _CHECKSUM.start + 6] = _octal(sums, 6)
    headers[:, _CHECKSUM.start + 6] = 0
    content = headers.tobytes()
    return [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]


def _octal(numbers: np.ndarray, digits: int) -> np.ndarray:
    """Numbers (N,) as octal digits in ASCII, uint8 (N, digits)."""
    shifts = np.arange(3 * (digits - 1), -1, -3)
    return (numbers[:, None] >> shifts & 7).astype(np.uint8) + np.uint8(ord("0"))


def padding(size: int) -> bytes:
    """Zeros from the end of a member of `size` bytes to the next block."""
    return bytes(-size % BLOCK)


def member(name: str, content: bytes) -> bytes:
    """A whole member: header, content, padding."""
    return b"".join((member_header(name, len(content)), content, padding(len(content))))


def end_of_archive(size: int) -> bytes:
    """The end of an archive whose members take `size` bytes: two blocks of zeros, and more up to a whole record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def archive(members: Iterable[tuple[str, bytes]]) -> Iterator[bytes]:
    """The bytes of an archive of (name, content) members, in pieces."""
    size = 0
    for name, content in members:
        piece = member(name, content)
        size += len(piece)
        yield piece
    yield end_of_archive(size)
