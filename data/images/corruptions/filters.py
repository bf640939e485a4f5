"""Building blocks of the effects, on float32 arrays: (H, W) planes or (H, W, C) images."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def gaussian(x: Floats, sigma: float, truncate: float = 4.0) -> Floats:
    """Gaussian blur; borders are mirrored.

    Args:
        sigma: standard deviation in pixels, ≥ 0.
        truncate: radius of the kernel in standard deviations.
    """
    rows, columns = (_gaussian_matrix(length, sigma, truncate) for length in x.shape[:2])
    return _both_axes(x, rows, columns)


def zoom(x: Floats, factor: float) -> Floats:
    """The middle 1/`factor` of both sides (factor ≥ 1), enlarged bilinearly to the full size."""
    rows, columns = (_zoom_matrix(length, factor) for length in x.shape[:2])
    return _both_axes(x, rows, columns)


def smear(x: Floats, offsets: NDArray[np.int64], weights: Floats) -> Floats:
    """Weighted mean of copies of `x`, each shifted by an offset (rows, columns); border pixels are repeated.

    Args:
        offsets: (N, 2) pixels.
        weights: (N,); divided by their sum.
    """
    reach = int(abs(offsets).max(initial=0))
    height, width = x.shape[:2]
    padded = np.pad(x, [(reach, reach)] * 2 + [(0, 0)] * (x.ndim - 2), mode="edge")
    result = np.zeros_like(x)
    for (down, right), weight in zip(offsets + reach, weights / weights.sum(), strict=True):
        result += weight * padded[down : down + height, right : right + width]
    return result


def motion(x: Floats, radius: float, sigma: float, degrees: float) -> Floats:
    """Motion blur in a direction, with half a Gaussian of deviation `sigma`, 2 × `radius` + 1 pixels long."""
    steps = np.arange(2 * max(1, round(radius)) + 1)
    angle = math.radians(degrees)
    offsets = np.rint(np.outer(steps, [math.sin(angle), math.cos(angle)])).astype(np.int64)
    return smear(x, offsets, np.exp(-(steps**2) / (2 * sigma**2)).astype(np.float32))


def fractal(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Floats:
    """Cloudy noise (H, W) from 0 to 1: octaves of random grids, each finer than the one before and weaker by `decay` squared.

    The square follows the original, whose diamond-square algorithm multiplies the amplitude by itself.
    """
    plane = np.zeros(shape, np.float32)
    for octave in range(1, max(1, math.ceil(math.log2(max(shape)))) + 1):
        size = 2**octave + 1
        grid = rng.uniform(-1, 1, (size, size)).astype(np.float32)
        rows, columns = (_linear_matrix(np.linspace(0, size - 1, length), size) for length in shape)
        plane += decay ** (-2 * octave) * (rows @ grid @ columns.T)
    plane -= plane.min()
    return plane / max(float(plane.max()), 1e-6)


def sample(x: Floats, rows: Floats, columns: Floats) -> Floats:
    """`x` (H, W, C) at fractional places, `rows` and `columns` (H, W), bilinearly; mirrored at the borders."""
    (top, down), (left, right) = _split(rows, x.shape[0]), _split(columns, x.shape[1])
    below, beside = np.minimum(top + 1, x.shape[0] - 1), np.minimum(left + 1, x.shape[1] - 1)
    upper = x[top, left] * (1 - right) + x[top, beside] * right
    lower = x[below, left] * (1 - right) + x[below, beside] * right
    return upper * (1 - down) + lower * down


def _split(places: Floats, length: int) -> tuple[NDArray[np.int64], Floats]:
    """Integer part and fraction of places mirrored into 0 … length − 1; the fraction gets an axis for channels."""
    period = max(2 * (length - 1), 1)
    places = np.abs((places + length - 1) % period - (length - 1)) if length > 1 else np.zeros_like(places)
    whole = np.minimum(places.astype(np.int64), length - 1)
    return whole, (places - whole)[..., None].astype(np.float32)


def _both_axes(x: Floats, rows: Floats, columns: Floats) -> Floats:
    half: Floats = np.tensordot(rows, x, axes=(1, 0))
    return np.moveaxis(np.tensordot(half, columns, axes=(1, 1)), -1, 1)


@lru_cache(maxsize=256)
def _gaussian_matrix(length: int, sigma: float, truncate: float) -> Floats:
    """(length, length); each row has the weights of one blurred pixel."""
    reach = int(truncate * sigma + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / max(2 * sigma**2, 1e-9))
    sources = np.pad(np.arange(length), reach, mode="symmetric")
    matrix = np.zeros((length, length))
    for row in range(length):
        np.add.at(matrix[row], sources[row : row + 2 * reach + 1], weights / weights.sum())
    return matrix.astype(np.float32)


@lru_cache(maxsize=1024)
def _zoom_matrix(length: int, factor: float) -> Floats:
    middle = (length - 1) / 2
    return _linear_matrix(middle + (np.arange(length) - middle) / factor, length)


def _linear_matrix(places: NDArray[Any], length: int) -> Floats:
    """Linear interpolation at places within 0 … length − 1: (len(places), length)."""
    distance = np.abs(places[:, None] - np.arange(length)[None, :])
    return np.maximum(0, 1 - distance).astype(np.float32)
