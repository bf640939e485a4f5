"""Small grey pictures of whole images, and how alike two of them are: copies in other sizes and encodings are nearly equal."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.images.decode import GREY, Pixels

SIDE = 16


def thumbnail(image: Pixels) -> NDArray[np.uint8]:
    """The whole image in grey, squeezed to a square by averaging areas.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (SIDE, SIDE).
    """
    grey = image.astype(np.float32) @ GREY
    squeezed = _areas(image.shape[0]) @ grey @ _areas(image.shape[1]).T
    return np.rint(squeezed).astype(np.uint8)


@lru_cache(maxsize=1024)
def _areas(length: int) -> NDArray[np.float32]:
    """What part of each cell every pixel of a side covers: float32 (SIDE, length), rows sum to 1.

    Pixels on a cell's edge count by parts: Pillow's BOX gives them whole, which makes a mirrored image another one.
    """
    edges = np.arange(SIDE + 1) * (length / SIDE)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(covered, 0) * (SIDE / length)).astype(np.float32)


def normalized(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors whose dot product is the correlation of two thumbnails: zero mean, unit length.

    Flat ones have nothing to correlate: they get 1 with each other and 0 with all else.

    Args:
        thumbnails: uint8 (N, SIDE, SIDE).

    Returns:
        float32 (N, SIDE * SIDE).
    """
    vectors = thumbnails.reshape(len(thumbnails), SIDE * SIDE).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 0, vectors / np.maximum(length, 1e-6), np.float32(1 / SIDE)).astype(np.float32)


def mirrored(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Left and right swapped: uint8 (N, SIDE, SIDE)."""
    return thumbnails[:, :, ::-1]
