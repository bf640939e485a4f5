"""A file that can be fetched: what identifies its bytes, and how any range of them is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data import storage

_PIECE = 1 << 20


class OutdatedError(ValueError):
    """What was there when the server started is not there any more as it was; the message is for the client."""


@dataclass(frozen=True)
class Body:
    """Bytes that can be sent.

    Attributes:
        read: bytes `start` to `stop`, in pieces; blocks.
        path: of a local file that has them all, which the kernel can send by itself.
    """

    size: int
    read: Callable[[int, int], Iterator[bytes]]
    path: Path | None = None


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
    return Body(len(content), lambda start, stop: iter((content[start:stop],)))


def file_body(url: str, size: int) -> Body:
    """A body that is a file of its own."""
    return Body(size, partial(_read_file, url), storage.local_path(url) if storage.is_local(url) else None)


def _read_file(url: str, start: int, stop: int) -> Iterator[bytes]:
    with storage.open_read(url) as file:
        file.seek(start)
        while start < stop and (piece := file.read(min(_PIECE, stop - start))):
            yield piece
            start += len(piece)
