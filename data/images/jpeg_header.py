"""Read a JPEG's markers without decoding: its shape, whether it is plain and upright, and whether it has too many scans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from .orientation import EXIF_PREFIX, NO_ORIENTATION, UPRIGHT, orientation_in_exif, orientation_in_xmp

JPEG = b"\xff\xd8\xff"
MAX_SCANS = 100
"""JPEGs of more scans are refused: encoders write about ten, and even an empty scan costs a pass over all blocks."""

_MAX_SEGMENTS = 1000  # of a plain JPEG, before the image data
_MAX_MARKERS = 10_000  # in the image data, without restarts, of a JPEG that may have too many scans
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
_PROGRESSIVE, _SCAN, _END, _APP1 = 0xC2, 0xDA, 0xD9, 0xE1
_APPLICATION = frozenset(range(0xE0, 0xF0))
_TABLES = frozenset(
    (0xC4, 0xDB, 0xDD, 0xFE)
)  # DHT, DQT, DRI, COM: libjpeg refuses everything there that Pillow refuses
_ALONE = frozenset((0x01, 0xD8))  # markers without a length
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_MIN_BYTES = {0xE0: (b"JFIF", 14), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}
_RESOURCES, _RESOURCE = b"Photoshop 3.0\0", b"8BIM"
_ANY_SCAN = re.compile(rb"\xff\xda")  # regular expressions search in half the time of bytes.find
_ANY_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

_Slice = tuple[int, int]


class _Frame(NamedTuple):
    height: int
    width: int
    components: int
    progressive: bool


def plain_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of a plain, upright JPEG, which libjpeg and Pillow read alike; None for any other file.

    Plain means: complete segments without padding; application segments of their full length; one frame of 8 bits with one or three
    components; no EXIF or XMP that asks for a rotation; not too many scans. Pillow decides about all other files.
    """
    frame: _Frame | None = None
    exif, xmp = list[_Slice](), None
    for marker, start, end in _segments(content):
        if marker in _FRAMES:
            is_second, frame = frame is not None, _frame(content, marker, start, end)
            if is_second or frame is None:
                return None
        elif marker == _APP1 and content.startswith(EXIF_PREFIX, start, end):
            exif.append((start, end))
        elif marker == _APP1 and content.startswith(_XMP, start, end):
            xmp = start, end
        elif marker == _SCAN:
            if frame is None or start == end or not _is_upright(content, exif, xmp):
                return None
            if (frame.progressive or content[start] != frame.components) and has_many_scans(content, end):
                return None
            return frame.height, frame.width
        elif marker in _APPLICATION and _is_cut(content, marker, start, end):
            return None
    return None


def frame_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG's first frame names, plain or not; None where none is found."""
    for marker, start, end in _segments(content):
        if marker in _FRAMES and end - start >= 5:
            return content[start + 1] << 8 | content[start + 2], content[start + 3] << 8 | content[start + 4]
    return None


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of content) of each segment, up to the first scan's header or the first segment that is not plain."""
    at, length = 2, len(content)
    for _ in range(_MAX_SEGMENTS if content.startswith(JPEG) else 0):
        if at + 4 > length or content[at] != 0xFF:
            return
        marker, start, at = content[at + 1], at + 4, at + 2 + (content[at + 2] << 8 | content[at + 3])
        if not start <= at <= length:
            return
        if marker not in _TABLES:
            if marker not in _APPLICATION and marker not in _FRAMES and marker != _SCAN:
                return
            yield marker, start, at


def _frame(content: bytes, marker: int, start: int, end: int) -> _Frame | None:
    if end - start < 6:
        return None
    bits, components = content[start], content[start + 5]
    height, width = content[start + 1] << 8 | content[start + 2], content[start + 3] << 8 | content[start + 4]
    if bits != 8 or components not in (1, 3) or end - start != 6 + 3 * components or not height or not width:
        return None
    return _Frame(height, width, components, marker == _PROGRESSIVE)


def _is_cut(content: bytes, marker: int, start: int, end: int) -> bool:
    """Whether an application segment is so short that Pillow might refuse it, though libjpeg accepts it."""
    if marker == 0xED:  # Pillow reads past a resource that ends after its number
        return content.startswith(_RESOURCES, start, end) and content.startswith(_RESOURCE, end - 6, end)
    beginning, minimum = _MIN_BYTES.get(marker, (b"", 0))
    return end - start < minimum and content.startswith(beginning, start, end)


def _is_upright(content: bytes, exif: list[_Slice], xmp: _Slice | None) -> bool:
    asked: int | None = NO_ORIENTATION
    if exif:
        asked = orientation_in_exif(content[exif[0][0] : exif[0][1]]) if len(exif) == 1 else None
    if asked == NO_ORIENTATION and xmp:
        asked = orientation_in_xmp(content, *xmp)
    return asked in (NO_ORIENTATION, UPRIGHT)


def has_many_scans(content: bytes, start: int) -> bool:
    """Whether the image data has more than MAX_SCANS scans; `start`: the byte after the first scan's header."""
    if not any(True for _ in islice(_ANY_SCAN.finditer(content, start), MAX_SCANS - 1, None)):
        return False  # some may come after the image's end (a video, other images): count exactly
    scans, at = 1, start
    for _ in range(_MAX_MARKERS):
        found = _ANY_MARKER.search(content, at)
        if found is None or content[found.end() - 1] == _END:
            return scans > MAX_SCANS
        marker, at = content[found.end() - 1], found.end()
        scans += marker == _SCAN
        if marker not in _ALONE:
            at += int.from_bytes(content[at : at + 2], "big")
    return True
