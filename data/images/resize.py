"""The fast way from pixels to a model's clean view: torch's resize on uint8, which differs from Pillow's by a level here and there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from data.images.decode import Pixels, resized_shape, trim

_REACH = 3  # of the resize's kernel, in resized pixels, or source pixels where those are larger


def eval_transform_fast(image: Pixels, image_size: int, crop_pct: float, interpolation: str = "bicubic") -> Pixels:
    """As `data.images.decode.eval_transform` in mode `crop`, with torch's uint8 kernels.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (image_size, image_size, 3).
    """
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
    """What is resized of an axis: all up to the end of the centre crop. (Beginning at the crop would move the image by a
    fraction of a source pixel.)"""
    first = round((new - size) / 2)
    needed = min(old, math.ceil((first + size + _REACH) * max(1, old / new)))
    return _Axis(needed, new / old, slice(first, first + size))
