"""Read one image from a file, a URL or bytes, by the same rule as training, labeling and evaluation.

    image = load_image("photo.png")

`PIL.Image.open(…).convert("RGB")` gives other pixels: it makes transparent areas black, leaves photos of phones on their side, and cuts
16-bit greys off. A model that never saw such images is wrong about them.
"""

from __future__ import annotations

import os

from PIL import Image

from .. import storage
from ..errors import DataError
from ..storage.redact import redacted
from .decode import DecodeError, decode


def load_image(source: str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
    """Read an image: RGB, upright, at its full size.

    The rule (`data.images.decode`): JPEG, PNG or WebP; the first frame; turned as EXIF says; transparency composited on white; CMYK,
    palettes, grey and 16 bits converted to 8-bit RGB; colour profiles ignored.

    Args:
        source: a path, a URL (`https://…`, `s3://…`), or the encoded bytes.
        name: of the image in errors; by default the path or URL.

    Raises:
        DataError: the bytes are no image, or a damaged one.
        FileNotFoundError, StorageError: as `storage.read_bytes`.
    """
    if isinstance(source, bytes):
        content, name = source, name or f"an image of {len(source)} bytes"
    else:
        content, name = storage.read_bytes(os.fspath(source)), name or redacted(os.fspath(source))
    try:
        return Image.fromarray(decode(content))
    except DecodeError as error:
        raise DataError(f"{name} cannot be decoded ({error})") from error
