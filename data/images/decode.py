"""Decode images from bytes to pixels, by one rule for training, labeling, evaluation and serving.

The rule: JPEG, PNG and WebP only; first frame; EXIF orientation applied (a bad EXIF block is ignored); transparency
composited on white; CMYK and palettes converted to RGB; 16-bit greyscale keeps its high byte, as Pillow does for 16-bit
colour; grey is repeated to three channels; colour profiles are ignored. Anything else raises DecodeError.

Pillow decides what is an image and which way is up (`Image.open`, `ImageOps.exif_transpose`), so that readers of an export get the same
pixels. Two exceptions: files that would take Pillow minutes or gigabytes are refused, and a PNG with more compressed text than Pillow
unpacks is read.

`decode_fast` uses libjpeg-turbo for plain JPEGs (`data.images.jpeg_header`). Without scaling, its pixels are Pillow's, bit for bit. All
other files (other formats, CMYK and YCCK, images to rotate, unusual headers, damaged files) go to `decode`.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from contextlib import nullcontext
from itertools import islice

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .jpeg_header import JPEG, MAX_SCANS, has_many_scans, plain_shape
from .orientation import orientation, orientation_in_exif, without_warnings
from .png_chunks import COMPRESSED, PNG, chunks, with_long_text_unpacked

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused as decompression bombs (192 MiB as RGB). Pillow itself warns from 89 million pixels."""

MAX_SIDE = 65_535
"""Longer sides are refused (JPEG's own limit), so that arrays per row or column (a resized strip, the hash's cosines) stay small."""

_WHITE = (255, 255, 255)
_MAX_HEADER = 32 * 1024 * 1024  # bytes of a JPEG before its pixels
_READ = 32  # bytes that each read counts extra: Pillow reads padding byte by byte and keeps every segment
_MAX_CHUNKS = 300_000  # of a PNG
_MAX_COMPRESSED_CHUNKS = 1000  # of a PNG, without its pixels: each may unpack to a megabyte
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_KEEP = 2.0  # scale to at least this times the wanted size; with 1.0, a tenth of the labels changed (docs/labeling.md)


class DecodeError(ValueError):
    """The bytes are no complete, decodable image; the message is the reason."""


class _Jpeg(JpegImageFile):
    """Pillow's JPEG reader, without warnings from looking for a resolution in unusual EXIF blocks."""

    def _read_dpi_from_exif(self) -> None:
        if (
            "exif" in self.info and orientation_in_exif(self.info["exif"]) is None
        ):  # it refuses some of these, and warns
            with without_warnings():
                super()._read_dpi_from_exif()


class _JpegHeader(io.BytesIO):
    """Stop Pillow when a header is so long that reading it takes seconds."""

    room = _MAX_HEADER

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.room -= _READ + len(content)
        if self.room < 0:
            raise DecodeError(f"JPEG with more than {_MAX_HEADER} bytes before its pixels, or a million segments")
        return content


def decode(content: bytes) -> Pixels:
    """Decode one JPEG, PNG or WebP file by the rule above to RGB: uint8 (H, W, 3), writable and contiguous.

    Raises DecodeError for another format, and for a file that is damaged, truncated, over MAX_PIXELS, MAX_SIDE or MAX_SCANS, or too
    slow to read.
    """
    try:
        try:
            return _decode(content)
        except DecodeError:
            raise
        except ValueError:
            readable = with_long_text_unpacked(content) if content.startswith(PNG) else content
            if readable is content:
                raise
        return _decode(readable)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise a dozen types for damaged files
        raise DecodeError(f"{type(error).__name__}: {error}") from error


def _decode(content: bytes) -> Pixels:
    image = _open(content)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width}×{height} pixels, more than the {MAX_PIXELS} allowed")
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"{width}×{height} pixels, a side longer than the {MAX_SIDE} allowed")
    image.load()
    return _to_rgb(image)


def _open(content: bytes) -> ImageFile:
    """Read the header, with the reader for the first bytes (half the cost of Image.open)."""
    if content.startswith(JPEG):
        return _open_jpeg(content)
    if content.startswith(PNG):
        return _open_png(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return WebPImageFile(io.BytesIO(content))
    raise DecodeError(f"not a JPEG, PNG or WebP file: {len(content)} bytes that begin with {content[:8]!r}")


def _open_jpeg(content: bytes) -> ImageFile:
    header = _JpegHeader(content)
    image = _Jpeg(header)
    if has_many_scans(content, header.tell()):
        raise DecodeError(f"JPEG of more than {MAX_SCANS} scans")
    image.fp = io.BytesIO(content)  # without the limit on bytes
    return image


def _open_png(content: bytes) -> ImageFile:
    kinds = Counter(kind for kind, _, _ in islice(chunks(content), _MAX_CHUNKS + 1))
    if kinds.total() > _MAX_CHUNKS:
        raise DecodeError(f"PNG of more than {_MAX_CHUNKS} chunks")
    if sum(kinds[kind] for kind in COMPRESSED) > _MAX_COMPRESSED_CHUNKS:
        raise DecodeError(f"PNG with more than {_MAX_COMPRESSED_CHUNKS} chunks of compressed text or colour profiles")
    with without_warnings() if kinds[b"acTL"] else nullcontext():  # Pillow warns about bad animation headers
        return PngImageFile(io.BytesIO(content))


def _to_rgb(image: Image.Image) -> Pixels:
    turned = _TRANSPOSITIONS.get(orientation(image))
    if turned is not None:
        info = image.info
        image = image.transpose(turned)
        image.info = info
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, _WHITE)
        image.paste(rgba, mask=rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bit(image: Image.Image) -> Pixels:
    deep = np.asarray(image)
    grey = (deep >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[deep == image.info["transparency"]] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


def decode_fast(content: bytes, shorter_side: int = 0, buffer: Pixels | None = None) -> Pixels:
    """As `decode`; scales JPEGs that are at least four times too large while decoding.

    Args:
        shorter_side: wanted pixels of the shorter side; a scaled image has at least twice as many. 0: never scale.
        buffer: uint8 (N,), memory for the pixels if they fit: fresh memory for each image costs a fifth of the time.
    """
    shape = jpeg_shape(content)
    if shape is None:
        return decode(content)
    if buffer is not None and buffer.size < 3 * shape[0] * shape[1]:
        buffer = None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(content, "RGB", buffer=buffer, **jpeg_scale(*shape, shorter_side))
    except ValueError:
        return decode(content)
    return pixels


def jpeg_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that the fast decoder takes; None for any other file."""
    shape = plain_shape(content)
    return shape if shape and shape[0] * shape[1] <= MAX_PIXELS else None


def header_shape(content: bytes) -> tuple[int, int] | None:
    """Height and width of an image that Pillow can open, from its header; None for any other file."""
    try:
        width, height = _open(content).size
    except MemoryError:
        raise
    except Exception:  # see `decode`
        return None
    return height, width


def jpeg_scale(height: int, width: int, shorter_side: int) -> dict[str, float]:
    """Arguments of simplejpeg for scaling while decoding; empty for a JPEG that is decoded in full. See `decode_fast`."""
    factor = _KEEP * shorter_side / min(height, width)
    if not shorter_side or factor > 0.5:
        return {}
    return {"min_height": math.ceil(factor * height), "min_width": math.ceil(factor * width), "min_factor": 2}
