"""Perceptual hashes and thumbnails: nearly equal for copies of an image in other sizes and encodings."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .decode import Pixels

SIDE = 16
"""Rows and columns of a thumbnail."""
CHROMA_SIDE = 8
"""Rows and columns of a thumbnail's chroma; as in JPEGs, half those of the grey values."""
_HASH_SAMPLES = 64
"""The hash uses at least this many rows and columns, if the image has them."""
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in a grey value (ITU-R BT.601)."""
_CHROMA_SCALE = (0.5 / (1 - GREY[[2, 0]]))[:, None, None]  # so that pure blue and pure red have 127.5

_Pixel = TypeVar("_Pixel", np.uint8, np.int8)


def image_hash(image: Pixels) -> int:
    """64-bit perceptual hash of an image, uint8 (H, W, 3): few bits differ between copies in other sizes or encodings.

    pHash's DCT hash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", 3.2.1): bit i
    is set if the i-th of the 8 × 8 lowest non-constant frequencies is above their median. Here the cosine transform is of
    every n-th pixel of the image at its own size, instead of the image resized to 32 × 32.
    """
    step = max(1, min(image.shape[:2]) // _HASH_SAMPLES)
    sampled = image[step // 2 :: step, step // 2 :: step]
    colors = sampled.transpose(2, 0, 1).astype(np.float32, order="C")  # half the time of pixel by pixel
    grey = (GREY @ colors.reshape(3, -1)).reshape(*sampled.shape[:2])
    low = (_cosines(grey.shape[0]) @ grey @ _cosines(grey.shape[1]).T).ravel()
    return int.from_bytes(np.packbits(low > np.partition(low, 31)[31]).tobytes(), "big")


@lru_cache(maxsize=1024)
def _cosines(length: int) -> NDArray[np.float32]:
    """Rows 1 to 8 of the DCT-II of this length: float32 (8, length)."""
    angles = np.pi / length * np.outer(np.arange(1, 9), np.arange(length) + 0.5)
    return np.cos(angles).astype(np.float32)


def thumbnail(image: Pixels) -> NDArray[np.uint8]:
    """The whole image in grey, squeezed to a square by averaging: uint8 (H, W, 3) to (SIDE, SIDE)."""
    grey = image.astype(np.float32) @ GREY
    squeezed = _areas(image.shape[0], SIDE) @ grey @ _areas(image.shape[1], SIDE).T
    return np.rint(squeezed).astype(np.uint8)


def chroma(image: Pixels) -> NDArray[np.int8]:
    """Colour of the whole image, squeezed to a square by averaging: uint8 (H, W, 3) to (2, CHROMA_SIDE, CHROMA_SIDE), Cb and Cr.

    JFIF's differences of blue and of red from the grey value (ITU-T T.871, 7), without its offset of 128: grey has 0, 0.
    """
    height, width, _ = image.shape
    rows = _areas(height, CHROMA_SIDE) @ image.reshape(height, -1).astype(np.float32)
    squeezed = _areas(width, CHROMA_SIDE) @ rows.reshape(CHROMA_SIDE, width, 3)
    differences = np.stack([squeezed[..., 2], squeezed[..., 0]]) - squeezed @ GREY
    return np.rint(np.clip(differences * _CHROMA_SCALE, -127, 127)).astype(np.int8)


@lru_cache(maxsize=2048)
def _areas(length: int, cells: int) -> NDArray[np.float32]:
    """Weights of the pixels of a side in each cell: float32 (cells, length), rows sum to 1.

    A pixel on a cell's edge counts partly in both cells. Pillow's BOX counts it whole in one, so that mirroring changes the result.
    """
    edges = np.arange(cells + 1) * (length / cells)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(covered, 0) * (cells / length)).astype(np.float32)


def normalized(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors of zero mean and unit length, float32 (N, SIDE * SIDE), whose dot product is the correlation of two thumbnails.

    A flat thumbnail has no correlation: it gets 1 with other flat ones and 0 with the rest.
    """
    vectors = thumbnails.reshape(len(thumbnails), SIDE * SIDE).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 0, vectors / np.maximum(length, 1e-6), np.float32(1 / SIDE)).astype(np.float32)


def mirrored(pictures: NDArray[_Pixel]) -> NDArray[_Pixel]:
    """Left and right swapped: thumbnails or chroma, (…, rows, columns)."""
    return pictures[..., ::-1]
