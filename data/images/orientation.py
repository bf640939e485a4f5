"""Find an image's orientation by Pillow's rule (`ImageOps.exif_transpose`): EXIF first, then XMP.

Pillow's EXIF reader warns about damaged blocks, and Python's warning filters are global to the process. So ordinary blocks are read
here, with the same result, and only unusual ones by Pillow, one thread at a time.
"""

from __future__ import annotations

import re
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

EXIF_PREFIX = b"Exif\0\0"
UPRIGHT = 1
NO_ORIENTATION = 0
_ORIENTATION, _X_RESOLUTION, _RESOLUTION_UNIT = 0x0112, 0x011A, 0x0128
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_USUAL = {_ORIENTATION: (_SHORT, _LONG), _X_RESOLUTION: (_RATIONAL,), _RESOLUTION_UNIT: (_SHORT,)}
"""Tags that Pillow reads, and the types of values that are read here."""
_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1))  # bytes of a value of each TIFF type
_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # Pillow's names of the places where it looks
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_warnings_lock = threading.Lock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Ignore warnings in the block, one thread at a time: the filters are global to the process."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def orientation(image: Image.Image) -> int:
    """The orientation (1 to 8) in a loaded image's metadata; 1 when they have none or Pillow cannot read them."""
    sources = [source for source in _SOURCES if source in image.info]
    if not sources:
        return UPRIGHT
    found = orientation_in_exif(image.info.get("exif"))
    if found or (found == NO_ORIENTATION and sources == ["exif"]):
        return found or UPRIGHT
    try:
        with without_warnings():
            value = image.getexif().get(_ORIENTATION, UPRIGHT)
    except MemoryError:
        raise
    except Exception:  # Pillow raises half a dozen types for damaged blocks
        return UPRIGHT
    return next((number for number in range(2, 9) if number == value), UPRIGHT)  # a rational 6/1 equals 6


def orientation_in_exif(exif: object) -> int | None:
    """The orientation (1 to 8) in an EXIF block; NO_ORIENTATION when it has none; None for an unusual block, which Pillow must read.

    In an ordinary block Pillow reads all entries without a warning, and the tags that it uses have their usual types and counts.
    """
    if not isinstance(exif, bytes):
        return None
    tiff = exif.removeprefix(EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, start)
        entries = struct.iter_unpack(order + "HHII", memoryview(tiff)[start + 2 :][: 12 * num_entries])
        return _find(entries, num_entries, len(tiff), order)
    except struct.error:  # cut off
        return None


def _find(entries: Iterator[tuple[int, ...]], num_entries: int, length: int, order: str) -> int | None:
    values, room = dict[int, int](), length
    for tag, kind, count, value in entries:
        num_entries -= 1
        size = _BYTES.get(kind, 0) * count
        if size > 4:  # the value is elsewhere in the block
            room -= size
        if not size or room < 0 or (size > 4 and value + size > length):
            return None
        if tag in _USUAL:
            if count != 1 or kind not in _USUAL[tag] or tag in values:
                return None
            values[tag] = (
                value >> 16 if kind == _SHORT and order == ">" else value & 0xFFFF if kind == _SHORT else value
            )
    if num_entries:
        return None
    value = values.get(_ORIENTATION, NO_ORIENTATION)
    return value if value <= 8 and (value or _ORIENTATION not in values) else UPRIGHT


def orientation_in_xmp(content: bytes, start: int, end: int) -> int:
    """The orientation in the XMP packet `content[start:end]`, as Pillow reads it; 1 when it has none."""
    match = _XMP.search(content, start, end)
    return int(match[1]) if match and match[1] in b"12345678" else UPRIGHT
