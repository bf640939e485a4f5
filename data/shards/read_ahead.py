"""Plan reads of images ahead of their use: neighbours of a shard in one piece, and no more pieces at once than memory allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

MAX_PIECE = 1 << 20
"""Bytes after which a piece takes no further image: a batch of whole shards comes in several pieces at once. At the 50 to 100 MB/s of a
store's connection, a piece takes about as long as its request waits."""
MAX_AHEAD = 64 << 20
"""Bytes that may be read before they are used, and one piece more."""
MAX_IMAGES = 256
"""Images that may be read before they are used. With 64 requests at once, enough to have the next in line."""
_REFILL = 0.75
"""Share of either limit below which more is read. Requests begun together share the wake-ups of the thread that makes them."""

Item = TypeVar("Item")


class Span(Protocol):
    """An image of `size` bytes, read as bytes `start` to `end` of its shard; not at all, if it has none."""

    @property
    def size(self) -> int: ...

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...


class Pending(Protocol):
    """A read that has begun."""

    size: int  # bytes that it holds before `result` is called; 0 if it reads only then

    def result(self) -> bytes:
        """Wait for the bytes. Raises the error of the read."""

    def cancel(self) -> None:
        """Make an end where nobody waits for the bytes any more."""


class Source(Protocol):
    """Shards, by position."""

    def gap(self, shard: int) -> int:
        """Bytes between two images that are rather read than left out."""

    def begin(self, shard: int, offset: int, size: int) -> Pending:
        """Begin to read."""


class _Piece:
    """Neighbouring images of a shard, read together; none, and no bytes, without a first one."""

    def __init__(self, shard: int, first: Span | None) -> None:
        self.shard, self.images = shard, 1
        self.start, self.end = (first.start, first.end) if first else (0, 0)
        self.pending: Pending | None = None
        self._content: bytes | None = None

    def takes(self, shard: int, span: Span, gap: int) -> bool:
        """Add an image if it belongs to this piece; the images of a shard come in ascending order."""
        if shard != self.shard or span.start - self.end > gap or span.end - self.start > MAX_PIECE:
            return False
        self.end, self.images = max(self.end, span.end), self.images + 1
        return True

    def begin(self, source: Source) -> int:
        """Begin to read, the first time; the bytes that are held from now on."""
        if self.pending is not None or self.start == self.end:
            return 0
        self.pending = source.begin(self.shard, self.start, self.end - self.start)
        return self.pending.size

    def content(self) -> bytes:
        """The piece's bytes."""
        if self._content is None:
            self._content = b"" if self.pending is None else self.pending.result()
        return self._content

    def use(self) -> int:
        """Count one image as used; the bytes that are not held any more."""
        self.images -= 1
        if self.images or self.pending is None:
            return 0
        self._content = None
        return self.pending.size

    def cancel(self) -> None:
        """Nobody waits for the bytes any more."""
        if self.pending is not None:
            self.pending.cancel()


def read_ahead(
    source: Source,
    chunks: Iterable[Sequence[Item]],
    where: Callable[[Item], tuple[int, Span]],
    max_bytes: int | None = None,
) -> Iterator[tuple[Item, bytes, int]]:
    """For each item of each chunk, in order: the item, the piece with its image, and the byte of the shard at which the piece starts.

    Neighbours are looked for within a chunk. Chunks are asked for as their images come in line.

    Args:
        max_bytes: that may be read before they are used, and one piece more; None: MAX_AHEAD.

    Raises:
        as the source's reads, at the item's turn.
    """
    items = (pair for chunk in chunks for pair in zip(chunk, _pieces(source, chunk, where), strict=True))
    ahead: deque[tuple[Item, _Piece]] = deque()
    held, more, limit = 0, True, MAX_AHEAD if max_bytes is None else max_bytes
    try:
        while True:
            share = _REFILL
            while more and (not ahead or (held < share * limit and len(ahead) < share * MAX_IMAGES)):
                share = 1.0
                if more := (upcoming := next(items, None)) is not None:
                    held += upcoming[1].begin(source)
                    ahead.append(upcoming)
            if not ahead:
                return
            item, piece = ahead[0]
            yield item, piece.content(), piece.start
            ahead.popleft()
            held -= piece.use()
    finally:
        for _, piece in ahead:
            piece.cancel()


def _pieces(source: Source, chunk: Sequence[Item], where: Callable[[Item], tuple[int, Span]]) -> list[_Piece]:
    """The piece of each item."""
    places = [where(item) for item in chunk]
    found = [_Piece(shard, None) for shard, _ in places]  # for images without bytes
    last: _Piece | None = None
    wanted = (number for number, (_, span) in enumerate(places) if span.size)
    for number in sorted(wanted, key=lambda n: (places[n][0], places[n][1].start)):
        shard, span = places[number]
        if last is None or not last.takes(shard, span, source.gap(shard)):
            last = _Piece(shard, span)
        found[number] = last
    return found
