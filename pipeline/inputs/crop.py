"""Geometry of a training view: random crop and shift, the affine map, and the resize."""

from __future__ import annotations

import math
import random

import torch
from torch.nn import functional

from data.images.decode import Pixels
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.noise import spread

_CROP_TRIES = 10  # as torchvision and TensorFlow

Box = tuple[slice, slice]


def shift(generator: random.Random, pad: int) -> int:
    """Draw a whole number from −pad to pad."""
    return int(generator.random() * (2 * pad + 1)) - pad


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: random.Random
) -> Box:
    """Draw Inception's random crop, rows and columns, by the rules of torchvision's RandomResizedCrop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.random() * (height - crop_height + 1))
            left = int(generator.random() * (width - crop_width + 1))
            return slice(top, top + crop_height), slice(left, left + crop_width)
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return slice(top, top + crop_height), slice(left, left + crop_width)


def scale_box(box: Box, old: tuple[int, ...], new: tuple[int, ...]) -> Box:
    """`box`, of an image of shape `old`, scaled to an image of shape `new`, in whole pixels."""
    rows, columns = (
        slice(round(part.start * after / before), max(1, round(part.stop * after / before)))
        for part, before, after in zip(box, old[:2], new[:2], strict=True)
    )
    return rows, columns


def resize(image: Pixels, size: int, interpolation: str) -> Pixels:
    """Resize to size × size, antialiased. Torch's uint8 kernel takes a third of Pillow's time; some pixels differ by one level."""
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # channels_last takes two thirds of the time of planes
    resized = functional.interpolate(pixels, (size, size), mode=interpolation, antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def affine_matrix(
    config: AugmentConfig, top: int, left: int, size: int, generator: random.Random
) -> tuple[float, float, float, float, float, float]:
    """Draw the affine map from pixels of the view to pixels of the image, about the centre of the view.

    Args:
        top, left: the pixel of the image at which the view begins without the map.
    """
    angle = math.radians(spread(generator, config.rotation))
    zoom = 1 + spread(generator, config.zoom)
    shear_x, shear_y = spread(generator, config.shear), spread(generator, config.shear)
    right, down = spread(generator, config.translate) * size, spread(generator, config.translate) * size
    cos, sin, middle = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    a, b = cos + shear_x * sin, -sin + shear_x * cos
    c, d = sin + shear_y * cos, cos - shear_y * sin
    return a, b, left + right + middle - (a + b) * middle, c, d, top + down + middle - (c + d) * middle
