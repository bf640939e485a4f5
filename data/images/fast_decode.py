"""The fast way from JPEG bytes to pixels: libjpeg-turbo's decoder.

Pixels of images that are not scaled while decoding are Pillow's own, bit for bit. It is for plain JPEGs
(`data.images.jpeg_header`); the rest (other formats, CMYK and YCCK, images to be turned, unusual headers, damaged files) goes to
`data.images.decode`, which decides by its rule.
"""

from __future__ import annotations

import math

import simplejpeg

from data.images.decode import MAX_PIXELS, Pixels, decode
from data.images.jpeg_header import plain_shape

_KEEP = 2.0  # a scaled image is so many times larger than needed; with 1.0, a tenth of the labels changed (docs/labeling.md)


def decode_fast(content: bytes, shorter_side: int = 0, buffer: Pixels | None = None) -> Pixels:
    """As `data.images.decode.decode`; JPEGs four times too large are scaled while they are decoded.

    Args:
        shorter_side: pixels that are wanted of the shorter side; a scaled image has at least twice as many. 0: never scale.
        buffer: uint8 (N,), where the pixels may be put if they fit: fresh memory for each image costs a fifth of the time.

    Returns:
        uint8 (H, W, 3) RGB, writable and contiguous.

    Raises:
        DecodeError: see `data.images.decode.decode`.
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
    """Height and width of a JPEG that is for the fast decoder; None for all else."""
    shape = plain_shape(content)
    return shape if shape and shape[0] * shape[1] <= MAX_PIXELS else None


def _scale(height: int, width: int, shorter_side: int) -> dict[str, float]:
    factor = _KEEP * shorter_side / min(height, width)
    if not shorter_side or factor > 0.5:
        return {}
    return {"min_height": math.ceil(factor * height), "min_width": math.ceil(factor * width), "min_factor": 2}
