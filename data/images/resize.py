"""Resize and crop pixels to a model's clean view: exactly like timm, or fast with torch, which differs by one level in places."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from .decode import Pixels

_MAX_ASPECT = 16  # long side over short side of what is resized
_REACH = 3  # of the resize kernel: resized pixels, or source pixels when enlarging


def eval_transform(
    image: Pixels, image_size: int, crop_pct: float, interpolation: str = "bicubic", mode: str = "crop"
) -> Pixels:
    """The view of an image without noise: uint8 (H, W, 3) to (image_size, image_size, 3).

    `crop` resizes the shorter side to floor(image_size / crop_pct) and crops the centre, pixel for pixel like timm's evaluation
    transform of a Pillow image. `pad` puts the centre on black without resizing, for small images.
    """
    height, width = image.shape[:2]
    if mode == "pad":
        return window(image, (height - image_size) // 2, (width - image_size) // 2, image_size)
    if mode != "crop":
        raise ValueError(f"mode must be 'crop' or 'pad', but is {mode!r}")
    image = trim(image)
    new_height, new_width = resized_shape(image.shape[0], image.shape[1], image_size, crop_pct)
    # `resize(box=…)` is faster, but off by one level in places
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling[interpolation.upper()])
    top, left = round((new_height - image_size) / 2), round((new_width - image_size) / 2)
    return np.array(resized.crop((left, top, left + image_size, top + image_size)))


def resized_shape(height: int, width: int, image_size: int, crop_pct: float) -> tuple[int, int]:
    """Height and width before the centre crop, rounded down as in timm and torchvision."""
    short, shorter = math.floor(image_size / crop_pct), min(height, width)
    return short * height // shorter, short * width // shorter


def trim(image: Pixels) -> Pixels:
    """The middle of a very long image: more than the centre crop needs, and small enough to resize."""
    height, width = image.shape[:2]
    longest = _MAX_ASPECT * min(height, width)
    top, left = max(0, (height - longest) // 2), max(0, (width - longest) // 2)
    return image[top : top + longest, left : left + longest]


def window(image: Pixels, top: int, left: int, size: int) -> Pixels:
    """The size × size window of `image` at (top, left), black outside the image."""
    result = np.zeros((size, size, 3), np.uint8)
    inside = image[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)]
    y, x = min(max(-top, 0), size), min(max(-left, 0), size)
    result[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return result


def eval_transform_fast(image: Pixels, image_size: int, crop_pct: float, interpolation: str = "bicubic") -> Pixels:
    """As `eval_transform` in mode `crop`, with torch's uint8 kernels."""
    image = trim(image)
    new_shape = resized_shape(image.shape[0], image.shape[1], image_size, crop_pct)
    rows, columns = (_axis(old, new, image_size) for old, new in zip(image.shape, new_shape, strict=False))
    pixels = torch.from_numpy(image[: rows.needed, : columns.needed])[None].permute(
        0, 3, 1, 2
    )  # channels_last: half the time
    resized = functional.interpolate(
        pixels, scale_factor=(rows.factor, columns.factor), mode=interpolation, antialias=True, align_corners=False,
        recompute_scale_factor=False,
    )  # fmt: skip
    return resized[0, :, rows.crop, columns.crop].permute(1, 2, 0).numpy()


class _Axis(NamedTuple):
    needed: int  # source pixels
    factor: float
    crop: slice  # of the resized ones


def _axis(old: int, new: int, size: int) -> _Axis:
    """The part of an axis to resize: from its start to the end of the centre crop. (Starting at the crop would shift the image by a
    fraction of a source pixel.)"""
    first = round((new - size) / 2)
    needed = min(old, math.ceil((first + size + _REACH) * max(1, old / new)))
    factor = new / old
    while (
        int(needed * factor) < first + size
    ):  # rounded down, as 49 · (32 / 49) is below 32, and torch gives as many pixels
        factor = math.nextafter(factor, math.inf)
    return _Axis(needed, factor, slice(first, first + size))
