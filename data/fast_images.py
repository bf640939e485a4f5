"""The fast way from JPEG bytes to pixels: libjpeg-turbo's decoder.

Pixels of images that are not scaled while decoding are Pillow's own, bit for bit. What the decoder does not take (other formats,
CMYK, damaged files) goes to `data.images`, which decides by its rule.
"""

from __future__ import annotations

import math

import simplejpeg

from data.images import MAX_PIXELS, Pixels, decode, orientation

_JPEG = b"\xff\xd8\xff"
_APPLICATION = b"\xff\xe0", b"\xff\xef"  # first and last marker of such segments
_KEEP = 2.0  # a scaled image is so many times larger than needed; with 1.0, a tenth of the labels changed (docs/labeling.md)


def decode_fast(content: bytes, shorter_side: int = 0, buffer: Pixels | None = None) -> Pixels:
    """As `data.images.decode`; JPEGs four times too large are scaled while they are decoded.

    Args:
        shorter_side: pixels that are wanted of the shorter side; a scaled image has at least twice as many. 0: never scale.
        buffer: uint8 (N,), where the pixels may be put if they fit: fresh memory for each image costs a fifth of the time.

    Returns:
        uint8 (H, W, 3) RGB, writable and contiguous.

    Raises:
        DecodeError: see `data.images.decode`.
    """
    shape = jpeg_shape(content)
    if shape is None:
        return decode(content)
    if buffer is not None and buffer.size < 3 * shape[0] * shape[1]:
        buffer = None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB", buffer=buffer, **_scale(*shape, shorter_side))
    except ValueError:
        return decode(content)
    return pixels


def jpeg_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that the fast decoder takes; None for all else."""
    if not content.startswith(_JPEG) or _is_turned(content):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    return None if colors == "CMYK" or height * width > MAX_PIXELS else (height, width)


def _is_turned(content: bytes) -> bool:
    """Whether an EXIF block asks for another orientation. It is in one of the application segments that begin a file."""
    start = 2
    while _APPLICATION[0] <= content[start : start + 2] <= _APPLICATION[1] and len(content) >= start + 4:
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if content[start + 4 : start + 10] == b"Exif\0\0":
            return orientation(content[start + 4 : end]) != 1
        start = end
    return False


def _scale(height: int, width: int, shorter_side: int) -> dict[str, float]:
    factor = _KEEP * shorter_side / min(height, width)
    if not shorter_side or factor > 0.5:
        return {}
    return {"min_height": math.ceil(factor * height), "min_width": math.ceil(factor * width), "min_factor": 2}
