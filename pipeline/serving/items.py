"""A file that can be fetched: what identifies its bytes, and how any range of them is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from data import storage

_PIECE = 1 << 20


class OutdatedError(ValueError):
    """What was there when the server started is not there any more as it was; the message is for the client."""


@dataclass(frozen=True)
class Body:
    """Bytes that can be sent.

    Attributes:
        read: bytes `start` to `stop`, in pieces; blocks.
        open: of a body that is a local file, which the kernel can send by itself; blocks, raises OutdatedError.
    """

    size: int
    read: Callable[[int, int], Iterator[bytes]]
    open: Callable[[], BinaryIO] | None = None


@dataclass(frozen=True)
class Item:
    """A file of the catalog.

    Attributes:
        etag: names its bytes, quoted: the same tag is the same bytes, after a restart too.
        check: raises OutdatedError when what it is made of has changed; blocks.
        load: what is needed to send it; blocks, and is kept for the next request.
    """

    etag: str
    media_type: str
    check: Callable[[], None]
    load: Callable[[], Body]


def bytes_body(content: bytes) -> Body:
    """A body in memory."""

    def read(start: int, stop: int) -> Iterator[bytes]:
        return (content[at : min(at + _PIECE, stop)] for at in range(start, stop, _PIECE))

    return Body(len(content), read)


def file_body(url: str, size: int) -> Body:
    """A body that is a file of its own."""
    return Body(size, partial(_read_file, url), partial(open_file, url, size) if storage.is_local(url) else None)


def open_file(url: str, size: int | None = None) -> BinaryIO:
    """A local file, open for reading. Raises OutdatedError for a link, a pipe, a folder, or a file of another size."""
    name = storage.base_name(url)
    try:
        descriptor = os.open(storage.local_path(url), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would wait
    except OSError as error:
        raise OutdatedError(f"{name} cannot be opened ({error.strerror}); expected a file") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or size not in (None, found.st_size):
        os.close(descriptor)
        raise OutdatedError(f"{name} is not the file of {size} bytes that it was; restore it")
    return os.fdopen(descriptor, "rb")


def read_file(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """As `storage.read_bytes`; of a local one, raises OutdatedError as `open_file`."""
    if not storage.is_local(url):
        return storage.read_bytes(url, offset, size)
    with open_file(url) as file:
        file.seek(offset)
        return file.read() if size is None else file.read(size)


def is_regular(url: str) -> bool:
    """False where a local file is gone, or something else: reading a pipe would wait for ever."""
    try:
        return not storage.is_local(url) or stat.S_ISREG(storage.local_path(url).stat().st_mode)
    except OSError:
        return False


def _read_file(url: str, start: int, stop: int) -> Iterator[bytes]:
    with storage.open_read(url) as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(_PIECE, stop - start))):
            yield piece
            start += len(piece)
