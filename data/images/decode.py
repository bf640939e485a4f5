"""From bytes to pixels, by one rule for training, labeling, evaluation and serving.

The rule: JPEG, PNG and WebP only; first frame; EXIF orientation applied (a bad EXIF block is ignored); transparency
composited on white; CMYK and palettes converted to RGB; 16-bit greyscale keeps its high byte, as Pillow does for 16-bit
colour; grey is repeated to three channels; colour profiles are ignored. All else raises DecodeError.

What is an image, and which way is up, is Pillow's to say (`Image.open`, `ImageOps.exif_transpose`), so that whoever reads the
images of an export finds the same. Two exceptions: files that would take Pillow minutes or gigabytes are refused, and a PNG with more
compressed text than Pillow unpacks is read all the same.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data.images.jpeg_header import JPEG, MAX_SCANS, has_many_scans
from data.images.orientation import orientation, orientation_in_exif, without_warnings
from data.images.png_chunks import COMPRESSED, PNG, chunks, with_long_text_unpacked

Pixels = NDArray[np.uint8]

MAX_PIXELS = 64 * 1024 * 1024
"""Larger images are refused as decompression bombs (192 MiB as RGB); below Pillow's own warning at 89 million."""

MAX_SIDE = 65_535
"""Longer sides are refused: JPEG's own limit. What is made per row or column (a resized strip, the hash's cosines) stays small."""

_WHITE = (255, 255, 255)
_MAX_HEADER = 32 * 1024 * 1024  # bytes of a JPEG before its pixels
_READ = 32  # what a read counts for beside its bytes: Pillow takes padding byte by byte, and keeps every segment
_MAX_CHUNKS = 300_000  # of a PNG
_MAX_COMPRESSED_CHUNKS = 1000  # of a PNG, its pixels aside: each may unpack to a megabyte
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_ASPECT = 16  # of the part of an image that is resized


class DecodeError(ValueError):
    """Bytes that are not a whole, decodable image; the message is the reason."""


class _Jpeg(JpegImageFile):
    """Pillow's JPEG reader, but for its look for a resolution in EXIF where that is in vain."""

    def _read_dpi_from_exif(self) -> None:
        if (
            "exif" in self.info and orientation_in_exif(self.info["exif"]) is None
        ):  # it refuses some of these, and warns
            with without_warnings():
                super()._read_dpi_from_exif()


class _JpegHeader(io.BytesIO):
    """Stops Pillow where a header is so long that reading it takes seconds."""

    room = _MAX_HEADER

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.room -= _READ + len(content)
        if self.room < 0:
            raise DecodeError(f"JPEG with more than {_MAX_HEADER} bytes before its pixels, or a million segments")
        return content


def decode(content: bytes) -> Pixels:
    """Decode one JPEG, PNG or WebP file by the rule above.

    Returns:
        uint8 (H, W, 3) RGB, writable and contiguous.

    Raises:
        DecodeError: not such a file, damaged, truncated, over MAX_PIXELS, MAX_SIDE or MAX_SCANS, or too laborious otherwise.
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
    except Exception as error:  # Pillow's readers raise a dozen types on damaged input
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
    """Read the header by the reader that the first bytes name (half the cost of Image.open)."""
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
    image.fp = io.BytesIO(content)  # which counts nothing
    return image


def _open_png(content: bytes) -> ImageFile:
    kinds = Counter(kind for kind, _, _ in islice(chunks(content), _MAX_CHUNKS + 1))
    if kinds.total() > _MAX_CHUNKS:
        raise DecodeError(f"PNG of more than {_MAX_CHUNKS} chunks")
    if sum(kinds[kind] for kind in COMPRESSED) > _MAX_COMPRESSED_CHUNKS:
        raise DecodeError(f"PNG with more than {_MAX_COMPRESSED_CHUNKS} chunks of compressed text or colour profiles")
    with without_warnings() if kinds[b"acTL"] else nullcontext():  # Pillow warns about a bad animation header
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


def eval_transform(
    image: Pixels,
    image_size: int,
    crop_pct: float,
    interpolation: str = "bicubic",
    mode: str = "crop",
) -> Pixels:
    """The view of an image without noise: labeling, evaluation and serving see this.

    `crop` resizes the shorter side to floor(image_size / crop_pct) and takes the centre: pixel for pixel what timm's
    evaluation transform gives on a Pillow image. `pad` never resizes: the centre on black, for small images.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (image_size, image_size, 3).
    """
    height, width = image.shape[:2]
    if mode == "pad":
        return window(image, (height - image_size) // 2, (width - image_size) // 2, image_size)
    if mode != "crop":
        raise ValueError(f"mode must be 'crop' or 'pad', but is {mode!r}")
    image = trim(image)
    new_height, new_width = resized_shape(image.shape[0], image.shape[1], image_size, crop_pct)
    # `resize(box=…)` is faster but is off by one level here and there.
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling[interpolation.upper()])
    top, left = round((new_height - image_size) / 2), round((new_width - image_size) / 2)
    return np.array(resized.crop((left, top, left + image_size, top + image_size)))


def resized_shape(height: int, width: int, image_size: int, crop_pct: float) -> tuple[int, int]:
    """Height and width before the centre crop, rounded down as in timm and torchvision."""
    short, shorter = math.floor(image_size / crop_pct), min(height, width)
    return short * height // shorter, short * width // shorter


def trim(image: Pixels) -> Pixels:
    """The middle of a very long image: what the centre crop can see of it and more, so that resizing it costs no memory."""
    height, width = image.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image[top : top + longest, left : left + longest]


def window(image: Pixels, top: int, left: int, size: int, fill: int = 0) -> Pixels:
    """The size × size window of `image` at (top, left), which may lie outside it; there, `fill`."""
    result = np.full((size, size, 3), fill, dtype=np.uint8)
    inside = image[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]
    y, x = min(max(-top, 0), size), min(max(-left, 0), size)
    result[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return result


_HASH_SAMPLES = 64
"""At least this many rows and columns enter the hash, where the picture has them."""
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Parts of red, green and blue in a grey value (ITU-R BT.601)."""


def image_hash(image: Pixels) -> int:
    """64-bit perceptual hash: few bits differ between copies of a picture in other sizes or encodings.

    pHash's DCT hash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", 3.2.1): bit i
    is set where the i-th of the 8 × 8 lowest non-constant frequencies is above their median. Here the cosine transform
    is taken at the picture's own size, on every n-th pixel of large ones, instead of after resizing to 32 × 32.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        0 ≤ hash < 2**64.
    """
    step = max(1, min(image.shape[:2]) // _HASH_SAMPLES)
    sampled = image[step // 2 :: step, step // 2 :: step]
    colors = sampled.transpose(2, 0, 1).astype(np.float32, order="C")  # pixel by pixel it takes twice the time
    grey = (GREY @ colors.reshape(3, -1)).reshape(*sampled.shape[:2])
    low = (_cosines(grey.shape[0]) @ grey @ _cosines(grey.shape[1]).T).ravel()
    return int.from_bytes(np.packbits(low > np.partition(low, 31)[31]).tobytes(), "big")


@lru_cache(maxsize=1024)
def _cosines(length: int) -> NDArray[np.float32]:
    """Rows 1 to 8 of the DCT-II of this length: float32 (8, length)."""
    angles = np.pi / length * np.outer(np.arange(1, 9), np.arange(length) + 0.5)
    return np.cos(angles).astype(np.float32)
