"""How much images look alike by their thumbnails, in grey and in colour.

- g: correlation of the grey values.
- c: the same with colours: cosine of the angle between vectors of grey values less their mean, Cb and Cr. Grey images have c = g.

The correlation of two images is the smaller of g and (1 + c) / 2: colours may differ twice as much as grey values, because copies
differ more in saturation and tint than in shapes. Where one of the images is grey, it may be the other's grey copy: if their grey
values have the same contrast too, it is g.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.images.similarity import CHROMA_SIDE, SIDE, mirrored, normalized

_MAX_GREY = 2  # absolute Cb and Cr, of 127, of a grey image: encoding in colour leaves 1
_MAX_CONTRAST_RATIO = 1.05  # of an image and its grey copy (docs/selection.md)
_CELLS = CHROMA_SIDE**2
_Floats = NDArray[np.float32]
_Flags = NDArray[np.bool_]
_Positions = NDArray[np.int64]


class Thumbnails:
    """Thumbnails of n images, to compare with others.

    Args:
        grey: uint8 (n, SIDE, SIDE).
        chroma: int8 (n, 2, CHROMA_SIDE, CHROMA_SIDE).
        has_chroma: bool (n,), false: the colours are not known, and `chroma` is 0.

    Attributes:
        is_grey: bool (n,), the image has no colours, or they are not known.
    """

    def __init__(self, grey: NDArray[np.uint8], chroma: NDArray[np.int8], has_chroma: _Flags) -> None:
        self._grey, self._chroma, self.has_chroma = grey, chroma, has_chroma
        self.is_grey: _Flags = np.abs(chroma).max(axis=(1, 2, 3)) <= _MAX_GREY
        self._vectors = normalized(grey)
        self._contrast = grey.reshape(len(grey), SIDE * SIDE).std(axis=1, dtype=np.float32)

    def mirrored(self) -> Thumbnails:
        """Of the mirror images."""
        return Thumbnails(mirrored(self._grey), mirrored(self._chroma), self.has_chroma)

    def correlations(self, rows: _Positions, others: Thumbnails, images: _Positions, minimum: float) -> _Floats:
        """Correlation of each pair, float32 (m,). It is exact where it is at least `minimum`, and else only less than that.

        Args:
            rows: int64 (m,), positions here; these images' colours are known.
            images: int64 (m,), positions in `others`; where colours are not known, the pair is compared in grey.
        """
        alike: _Floats = np.einsum("ij,ij->i", self._vectors[rows], others._vectors[images])
        coloured = others.has_chroma[images] & ~(self.is_grey[rows] & others.is_grey[images])
        chosen = np.flatnonzero(coloured & (alike >= np.float32(minimum)))
        alike[chosen] = self._in_colour(rows[chosen], others, images[chosen], alike[chosen])
        return alike

    def _in_colour(self, rows: _Positions, others: Thumbnails, images: _Positions, grey: _Floats) -> _Floats:
        """The same, with colours. `grey`: without."""
        contrast, other_contrast = self._contrast[rows], others._contrast[images]
        one, other = self._colours(rows), others._colours(images)
        product = grey * contrast * other_contrast + (one * other).sum(axis=1) / _CELLS
        energy = contrast**2 + (one**2).sum(axis=1) / _CELLS
        other_energy = other_contrast**2 + (other**2).sum(axis=1) / _CELLS
        colour = product / np.maximum(np.sqrt(energy * other_energy), 1e-6)
        ratio = np.maximum(contrast, other_contrast) / np.maximum(np.minimum(contrast, other_contrast), 1e-6)
        is_grey_copy = (self.is_grey[rows] | others.is_grey[images]) & (ratio <= _MAX_CONTRAST_RATIO)
        return np.where(is_grey_copy, grey, np.minimum(grey, (1 + colour) / 2))

    def _colours(self, images: _Positions) -> _Floats:
        return self._chroma[images].reshape(len(images), 2 * _CELLS).astype(np.float32)
