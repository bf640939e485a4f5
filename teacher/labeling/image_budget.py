"""How a labeling worker divides its memory for images among files, decoding and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from teacher.labeling.byte_budget import ByteBudget

_MIN_BATCHES = 2  # one is decoded while the model works on another
_MAX_BATCHES = 8  # more would only wait: see `batches.ahead`
_BATCHES, _FILES = 1 / 4, 1 / 4  # shares of the whole; what is left is for decoding
_MIN_BYTES = 1 << 24  # for files, and for decoding
_MAX_PIECE = 1 << 25  # bytes of files that are read in one go


@dataclass(frozen=True)
class ImageBudget:
    """Limits of a labeling worker's memory for images.

    Attributes:
        num_batches: of decoded images, for the model.
        files: for encoded images, read and not yet decoded.
        decoding: for images while they are decoded and resized.
        total_bytes: of all together. One file or image larger than its limit is processed all the same, alone.
    """

    num_batches: int
    files: ByteBudget
    decoding: ByteBudget
    total_bytes: int

    @classmethod
    def of(cls, memory_bytes: int, batch_size: int, image_size: int) -> Self:
        """Divide `memory_bytes`. Two batches and 32 MiB are taken in any case."""
        batch_bytes = batch_size * image_size**2 * 3
        num_batches = min(_MAX_BATCHES, max(_MIN_BATCHES, int(_BATCHES * memory_bytes) // batch_bytes))
        files = max(_MIN_BYTES, int(_FILES * memory_bytes))
        decoding = max(_MIN_BYTES, memory_bytes - files - num_batches * batch_bytes)
        return cls(num_batches, ByteBudget(files), ByteBudget(decoding), files + decoding + num_batches * batch_bytes)

    @property
    def piece_bytes(self) -> int:
        """Bytes of files to read in one go: several such pieces fit, so that reading goes on while others are decoded."""
        return min(_MAX_PIECE, self.files.limit // 8)
