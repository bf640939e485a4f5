"""What a request asks for of a file: all, one range, or nothing new (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of `size`."""

    start: int
    stop: int
    size: int
    is_partial: bool

    def content_range(self) -> str:
        """The header's value."""
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def requested_span(headers: Mapping[str, str], etag: str, size: int) -> Span | None:
    """The bytes that are asked for; None for a range that begins behind the end.

    Anything but one range of bytes is answered with the whole file, as is a range of another version (`If-Range`).

    Args:
        etag: of the file, quoted.
    """
    whole = Span(0, size, size, False)
    match = _RANGE.fullmatch(headers.get("Range", "").strip().lower())
    if not match or match[0] == "bytes=-" or headers.get("If-Range", etag).strip() != etag:
        return whole
    first, last = match.groups()
    if not first:  # the last so many bytes
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return whole  # not a range
    return Span(start, stop, size, True) if start < min(stop, size) else None


def is_unchanged(headers: Mapping[str, str], etag: str) -> bool:
    """True when the client has this version (`If-None-Match`)."""
    return _names(headers.get("If-None-Match"), etag)


def is_other_version(headers: Mapping[str, str], etag: str) -> bool:
    """True when the client insists on another version (`If-Match`)."""
    return "If-Match" in headers and not _names(headers["If-Match"], etag)


def _names(tags: str | None, etag: str) -> bool:
    if tags is None:
        return False
    return tags.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in tags.split(",")]
