"""The 15 corruptions of ImageNet-C (arXiv 1903.12261), reimplemented with numpy and Pillow.

Each takes an image, float32 (H, W, 3) from 0 to 1, a generator, the factor for lengths in pixels, and its own constants, and
returns the same shape, not clipped. Docstrings name differences from the released code; the pixels were not compared with it.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ..similarity import GREY
from .filters import Floats, fractal, gaussian, motion, sample, smear, zoom

Generator = np.random.Generator
_PARTS = 8  # of a pixel's side, to measure how much of the pixel a disk covers
_ICE = np.array([0.78, 0.88, 1.0], np.float32)


def gaussian_noise(x: Floats, rng: Generator, scale: float, deviation: float) -> Floats:  # noqa: ARG001
    """Add normal noise."""
    return x + rng.normal(0, deviation, x.shape).astype(np.float32)


def shot_noise(x: Floats, rng: Generator, scale: float, photons: float) -> Floats:  # noqa: ARG001
    """Poisson noise; white is `photons` photons."""
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Floats, rng: Generator, scale: float, fraction: float) -> Floats:  # noqa: ARG001
    """Set a fraction of all values to 0 or 1."""
    chance = rng.random(x.shape, np.float32)
    return np.where(chance < fraction, np.float32(chance < fraction / 2), x)


def defocus_blur(x: Floats, rng: Generator, scale: float, radius: float, softness: float) -> Floats:  # noqa: ARG001
    """Blur with a disk with a slightly blurred edge. Pixels that it half covers count half, unlike in the original."""
    radius *= scale
    reach = int(radius) + 1
    fine = (np.arange((2 * reach + 1) * _PARTS) + 0.5) / _PARTS - reach - 0.5
    inside = np.add.outer(fine**2, fine**2) <= radius**2
    covered = inside.reshape(2 * reach + 1, _PARTS, 2 * reach + 1, _PARTS).mean(axis=(1, 3), dtype=np.float32)
    disk = gaussian(covered, softness)
    seen = disk > 1e-4
    return smear(x, np.argwhere(seen) - reach, disk[seen])


def glass_blur(x: Floats, rng: Generator, scale: float, sigma: float, reach: float, rounds: int) -> Floats:
    """Blur, shuffle pixels among neighbours, blur. All pixels move at once; the original swaps one by one."""
    reach = max(1, round(reach * scale))
    x = gaussian(x, sigma * scale)
    rows, columns = np.indices(x.shape[:2])
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, (2, *x.shape[:2]))
        x = x[(rows + down).clip(0, len(x) - 1), (columns + right).clip(0, x.shape[1] - 1)]
    return gaussian(x, sigma * scale)


def motion_blur(x: Floats, rng: Generator, scale: float, radius: float, sigma: float) -> Floats:
    """Blur in a direction from −45° to 45°."""
    return motion(x, radius * scale, sigma * scale, rng.uniform(-45, 45))


def zoom_blur(x: Floats, rng: Generator, scale: float, last: float, step: float) -> Floats:  # noqa: ARG001
    """Mean of the image and its enlargements, from 1 in steps to `last`."""
    factors = np.arange(1, last, step)
    return np.mean([x, *(zoom(x, float(factor)) for factor in factors)], axis=0, dtype=np.float32)


def snow(x: Floats, rng: Generator, scale: float, level: float, deviation: float, size: float, threshold: float, radius: float,
         sigma: float, kept: float) -> Floats:  # fmt: skip
    """Add flakes, blown in two directions, to a whitened image."""
    flakes = zoom(rng.normal(level, deviation, x.shape[:2]).astype(np.float32), max(1.0, size * scale))
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = motion(flakes, radius * scale, sigma * scale, rng.uniform(-135, -45))[..., None]
    whitened = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + np.rot90(flakes, 2, axes=(0, 1))


def frost(x: Floats, rng: Generator, scale: float, kept: float, ice: float) -> Floats:  # noqa: ARG001
    """Add ice. The original adds photographs of frost; here bright ridges of fractal noise stand for crystals."""
    fine, coarse = fractal(x.shape[:2], 1.15, rng), fractal(x.shape[:2], 1.6, rng)
    crystals = (1 - np.abs(2 * fine - 1)) ** 4
    return kept * x + ice * (0.25 + 0.75 * np.maximum(crystals, coarse**2))[..., None] * _ICE


def fog(x: Floats, rng: Generator, scale: float, amount: float, decay: float) -> Floats:  # noqa: ARG001
    """Add clouds of fractal noise, then darken to the image's own maximum."""
    white = float(x.max())
    clouded: Floats = x + amount * fractal(x.shape[:2], decay, rng)[..., None]
    return clouded * np.float32(white / (white + amount))


def brightness(x: Floats, rng: Generator, scale: float, added: float) -> Floats:  # noqa: ARG001
    """Raise the value (HSV); keep hue and saturation."""
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-6), raised)


def contrast(x: Floats, rng: Generator, scale: float, factor: float) -> Floats:  # noqa: ARG001
    """Multiply the distance from each channel's mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(x: Floats, rng: Generator, scale: float, reach: float, sigma: float, corner: float) -> Floats:
    """Move three points by up to `corner` (an affine map), and each pixel by a smooth field. Resamples once; the original twice."""
    shape = x.shape[:2]
    fields = rng.uniform(-1, 1, (2, *shape)).astype(np.float32)
    moved = np.indices(shape, np.float32) + [reach * scale * gaussian(field, sigma * scale, 3) for field in fields]
    middle, arm = np.array(shape) // 2, min(shape) // 3
    points = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    targets = points + rng.uniform(-corner * scale, corner * scale, points.shape)
    back = np.linalg.lstsq(np.column_stack([targets, np.ones(3)]), points, rcond=None)[0]  # (3, 2): target to source
    places = np.tensordot(back[:2].T, moved, axes=1) + back[2][:, None, None]
    return sample(x, places[0].astype(np.float32), places[1].astype(np.float32))


def pixelate(x: Floats, rng: Generator, scale: float, fraction: float) -> Floats:  # noqa: ARG001
    """Shrink both sides to a fraction by means over boxes, and enlarge again."""
    picture = _to_picture(x)
    small = [max(1, int(side * fraction)) for side in picture.size]
    box = Image.Resampling.BOX
    return _from_picture(picture.resize((small[0], small[1]), box).resize(picture.size, box))


def jpeg_compression(x: Floats, rng: Generator, scale: float, quality: int) -> Floats:  # noqa: ARG001
    """Encode as a JPEG of low quality, and decode."""
    buffer = io.BytesIO()
    _to_picture(x).save(buffer, "JPEG", quality=quality)
    return _from_picture(Image.open(buffer))


def _to_picture(x: Floats) -> Image.Image:
    return Image.fromarray((x * 255 + 0.5).astype(np.uint8))


def _from_picture(picture: Image.Image) -> Floats:
    return np.asarray(picture, np.float32) / np.float32(255)
