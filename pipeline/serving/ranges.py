"""What a request asks for of a file: all, one range, or nothing new (RFC 9110, sections 12 to 14)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from multidict import CIMultiDictProxy

_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.IGNORECASE)
_TAG = re.compile(r'(W/)?("[^"]*")')
_LONGEST_NUMBER = 18  # digits; a larger position is behind the end of any file
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
        """The header's value."""
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def requested_span(method: str, headers: Headers, etag: str, size: int) -> Span | None:
    """The bytes that are asked for; None for a range that begins behind the end.

    Anything but one range of bytes is answered with the whole file, as is a range of another version (`If-Range`), and any
    method but GET.

    Args:
        etag: of the file, quoted.
    """
    whole = Span(0, size, size, False)
    match = _RANGE.fullmatch(_value(headers, "Range").strip())
    if not match or not any(match.groups()) or method != "GET":
        return whole
    if (
        "If-Range" in headers and _value(headers, "If-Range").strip() != etag
    ):  # a weak tag or a date is no promise of equal bytes
        return whole
    first, last = (None if digits == "" else _position(digits) for digits in match.groups())
    if first is None:  # the last so many bytes
        start, stop = max(size - (last or 0), 0), size
    elif last is not None and last < first:
        return whole  # not a range
    else:
        start, stop = first, size if last is None else min(last + 1, size)
    return Span(start, stop, size, True) if start < stop else None


def is_unchanged(headers: Headers, etag: str) -> bool:
    """True when the client has this version (`If-None-Match`; weak tags count)."""
    return "If-None-Match" in headers and _names(_value(headers, "If-None-Match"), etag, True)


def is_other_version(headers: Headers, etag: str) -> bool:
    """True when the client insists on another version (`If-Match`; weak tags don't count)."""
    return "If-Match" in headers and not _names(_value(headers, "If-Match"), etag, False)


def accepts_gzip(headers: Headers) -> bool:
    """True when the client takes gzip at least as gladly as the text itself (`Accept-Encoding`)."""
    found = dict(map(_coding, _value(headers, "Accept-Encoding").lower().split(",")))
    gzip = max(found.get("gzip", -1.0), found.get("x-gzip", -1.0))
    gzip = found.get("*", 0.0) if gzip < 0 else gzip
    return gzip > 0 and gzip >= found.get("identity", 0.0)


def _coding(text: str) -> tuple[str, float]:
    """Name and q-value of an item; 0 for one that is malformed."""
    name, semicolon, parameter = text.partition(";")
    match = _QUALITY.fullmatch(parameter.strip())
    return name.strip(), float(match[1]) if match else 0.0 if semicolon else 1.0


def _names(tags: str, etag: str, weak_too: bool) -> bool:
    """Whether a list of tags has this one."""
    return tags.strip() == "*" or any(tag == etag and (weak_too or not weak) for weak, tag in _TAG.findall(tags))


def _value(headers: Headers, name: str) -> str:
    """A header that may be given in several lines."""
    return ",".join(headers.getall(name, ()))


def _position(digits: str) -> int:
    number = digits.lstrip("0")
    return int(number or "0") if len(number) <= _LONGEST_NUMBER else 10**_LONGEST_NUMBER
