"""Read neighbouring images of local shards into one buffer that is used again, for those who hand images on at once.

New memory for each megabyte costs three times as much as reading it from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from data import storage
from data.shards.image_reader import ImageReader, Place
from data.shards.tar_header import is_in_front

_ROUNDED = 1 << 18  # the buffer's size in bytes is a multiple of this
_MAX_WASTE = 2  # bytes read per wanted byte; images that lie further apart are read one by one


class ImageViews:
    """Images as views of a buffer, valid until the next call for the same shard. For one thread at a time.

    Checks images as `ImageReader` does, which also reads what lies in no local file or far apart.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self._reader, self._buffer = urls, ImageReader(urls), bytearray()
        self._shard, self._descriptor = -1, -1  # the one open file, and its position in `urls`

    def images(self, shard: int, places: Sequence[Place]) -> Sequence[bytes | memoryview]:
        """As `ImageReader.images`."""
        starts = [place.start for place in places]
        start, stop = min(starts), max(place.end for place in places)
        is_scattered = stop - start > _MAX_WASTE * sum(
            place.end - first for place, first in zip(places, starts, strict=True)
        )
        if is_scattered or not storage.is_local(self._urls[shard]):
            return self._reader.images(shard, places)
        piece = self._read(shard, start, stop - start)
        if len(piece) < stop - start:
            return self._reader.images(shard, places)  # raises: the shard was cut short
        return [
            self._image(shard, place, piece[first - start : place.end - start], place.offset - first)
            for place, first in zip(places, starts, strict=True)
        ]

    def _image(self, shard: int, place: Place, piece: memoryview, front: int) -> bytes | memoryview:
        """Cut off the `front` bytes before the image, which identify it."""
        if not is_in_front(bytes(piece[:front]), place.key, place.size):
            return self._reader.image(shard, place)  # looks further in front, or raises: it is another sample's
        return piece[front:]

    def _read(self, shard: int, offset: int, size: int) -> memoryview:
        """At most `size` bytes: fewer at the end of the file."""
        if shard != self._shard:
            self.close()
            self._descriptor = os.open(storage.local_path(self._urls[shard]), os.O_RDONLY | os.O_CLOEXEC)
            self._shard, self._buffer = shard, bytearray()  # views of the shard before stay valid
        if len(self._buffer) < size:
            self._buffer = bytearray(-(-size // _ROUNDED) * _ROUNDED)
        done, view = 0, memoryview(self._buffer)[:size]
        while done < size and (count := os.preadv(self._descriptor, [view[done:]], offset + done)):
            done += count
        return view[:done]

    def close(self) -> None:
        """Close all files."""
        self._reader.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._shard, self._descriptor = -1, -1
