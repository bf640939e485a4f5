"""The clean view: what a model sees of an image in labeling, evaluation and serving, from bytes to pixels in one step."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .decode import Pixels, decode, decode_fast
from .decoding_memory import decoding_bytes
from .resize import eval_transform, eval_transform_fast
from .similarity import image_hash

_BUFFER_BYTES = 3 << 21  # two megapixels of RGB
_thread = threading.local()

Decoder = Literal["fast", "pillow"]


@dataclass(frozen=True)
class EvalView:
    """How encoded bytes become pixels without noise.

    Attributes:
        image_size: side of the view, pixels.
        crop_pct: centre crop as a fraction of the resized side, for mode `crop`.
        interpolation: `bilinear` or `bicubic`.
        mode: `crop` resizes and crops like timm; `pad` centres small images on black without resizing.
        decoder: `pillow` gives timm's pixels exactly; `fast` takes half the time (see `data.images.decode.decode_fast`).
    """

    image_size: int
    crop_pct: float
    interpolation: str
    mode: Literal["crop", "pad"]
    decoder: Decoder = "pillow"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view: (image_size, image_size, 3)."""
        return (self.image_size, self.image_size, 3)

    def __call__(self, content: bytes) -> Pixels:
        """The view of one encoded image, uint8 (image_size, image_size, 3). Raises DecodeError."""
        return self.fit(self._decode(content))

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        """The view, and the image's 64-bit perceptual hash. Raises DecodeError."""
        image = self._decode(content)
        return self.fit(image), image_hash(image)

    def _decode(self, content: bytes) -> Pixels:
        if self.decoder == "pillow":
            return decode(content)
        if self.mode == "pad":  # may return the decoded image itself, so no shared buffer
            return decode_fast(content)
        return decode_fast(content, self._shorter_side, _buffer())

    @property
    def _shorter_side(self) -> int:
        return math.floor(self.image_size / self.crop_pct)

    def decoding_bytes(self, content: bytes) -> int:
        """Bytes of memory that making the view takes at its peak, from the header alone; 0 for a file that is no image."""
        shorter_side = self._shorter_side if self.mode == "crop" else 0
        return decoding_bytes(content, self.decoder == "fast", shorter_side)

    def fit(self, image: Pixels) -> Pixels:
        """The view of a decoded image: uint8 (H, W, 3) to (image_size, image_size, 3)."""
        if self.mode == "crop" and self.decoder == "fast":
            return eval_transform_fast(image, self.image_size, self.crop_pct, self.interpolation)
        return eval_transform(image, self.image_size, self.crop_pct, self.interpolation, self.mode)


def _buffer() -> Pixels:
    """This thread's buffer, for one image at a time."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = np.empty(_BUFFER_BYTES, np.uint8)
    return _thread.buffer
