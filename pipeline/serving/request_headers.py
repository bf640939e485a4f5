"""Parse request headers: range, conditions, content coding (RFC 9110, sections 12 to 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from multidict import CIMultiDictProxy

_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
_TAG = re.compile(r'(W/)?("[^"]*")')
_LONGEST_NUMBER = 18  # digits; a larger position is past the end of any file
_QUALITY = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)", re.IGNORECASE)
Headers = CIMultiDictProxy[str]


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of `size`."""

    start: int
    stop: int
    size: int
    is_partial: bool

    def content_range(self) -> str:
        """Return the value of `Content-Range`."""
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def requested_span(method: str, headers: Headers, etag: str, size: int) -> Span | None:
    """Return the requested bytes; None if the range starts past the end.

    The whole file, unless a GET has exactly one range of bytes, of this version (`If-Range`).

    Args:
        etag: of the file, quoted.
    """
    whole = Span(0, size, size, False)
    match = _RANGE.fullmatch(_value(headers, "Range").strip())
    if not match or not any(match.groups()) or method != "GET":
        return whole
    if (
        "If-Range" in headers and _value(headers, "If-Range").strip() != etag
    ):  # weak tags and dates do not prove equal bytes
        return whole
    first, last = (None if digits == "" else _position(digits) for digits in match.groups())
    if first is None:  # a suffix: the last `last` bytes
        start, stop = max(size - (last or 0), 0), size
    elif last is not None and last < first:
        return whole  # invalid range
    else:
        start, stop = first, size if last is None else min(last + 1, size)
    return Span(start, stop, size, True) if start < stop else None


def condition_status(headers: Headers, etag: str) -> int | None:
    """Return the status of an answer without content, 412 or 304, or None if the conditions ask for the content."""
    if is_other_version(headers, etag):
        return 412
    return 304 if is_unchanged(headers, etag) else None


def is_unchanged(headers: Headers, etag: str) -> bool:
    """Whether the client has this version (`If-None-Match`; weak tags count)."""
    return "If-None-Match" in headers and _has_tag(_value(headers, "If-None-Match"), etag, True)


def is_other_version(headers: Headers, etag: str) -> bool:
    """Whether the client insists on another version (`If-Match`; weak tags don't count)."""
    return "If-Match" in headers and not _has_tag(_value(headers, "If-Match"), etag, False)


def accepts_gzip(headers: Headers) -> bool:
    """Whether the client prefers gzip to plain text, or has no preference (`Accept-Encoding`)."""
    found = dict(map(_coding, _value(headers, "Accept-Encoding").lower().split(",")))
    gzip = max(found.get("gzip", -1.0), found.get("x-gzip", -1.0))
    gzip = found.get("*", 0.0) if gzip < 0 else gzip
    return gzip > 0 and gzip >= found.get("identity", 0.0)


def _coding(text: str) -> tuple[str, float]:
    """Return name and q-value of a coding; 0 if malformed."""
    name, semicolon, parameter = text.partition(";")
    match = _QUALITY.fullmatch(parameter.strip())
    return name.strip(), float(match[1]) if match else 0.0 if semicolon else 1.0


def _has_tag(tags: str, etag: str, allow_weak: bool) -> bool:
    """Whether a list of tags has this one."""
    return tags.strip() == "*" or any(tag == etag and (allow_weak or not weak) for weak, tag in _TAG.findall(tags))


def _value(headers: Headers, name: str) -> str:
    """Return a header's value; several lines of one name are joined."""
    return ",".join(headers.getall(name, ()))


def _position(digits: str) -> int:
    number = digits.lstrip("0")
    return int(number or "0") if len(number) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER
