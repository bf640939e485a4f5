"""How much memory decoding an image takes, from its header alone: what a budget of bytes needs to know before it decodes."""

from __future__ import annotations

from .decode import MAX_PIXELS, header_shape, jpeg_scale, jpeg_shape
from .jpeg_header import JPEG, frame_shape
from .png_chunks import PNG

# Bytes a pixel at the peak of decoding, resizing and hashing, beyond the file: measured as growth of the process at 10 megapixels
# (`python -m benchmarks.bench_label_memory`), rounded up.
_SCALED_JPEG, _PLAIN_JPEG, _OTHER_JPEG, _PNG, _WEBP = 4, 7, 15, 19, 27


def decoding_bytes(content: bytes, fast: bool, shorter_side: int = 0) -> int:
    """Bytes that decoding an image takes at its peak; 0 for a file that is no image.

    Args:
        fast: as `decode_fast`, with its `shorter_side`; else as `decode`.
    """
    if fast and (shape := jpeg_shape(content)) is not None:
        return shape[0] * shape[1] * (_SCALED_JPEG if jpeg_scale(*shape, shorter_side) else _PLAIN_JPEG)
    shape = (frame_shape(content) if content.startswith(JPEG) else None) or header_shape(content)
    if shape is None or shape[0] * shape[1] > MAX_PIXELS:
        return 0
    return (
        shape[0] * shape[1] * (_OTHER_JPEG if content.startswith(JPEG) else _PNG if content.startswith(PNG) else _WEBP)
    )
