"""Training views of an image: crop, flip and the student's input noise, a function of the pixels and a seed alone.

Order: geometry (one resampling), flip, RandAugment, brightness and contrast, cut-out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from data.images import Pixels, window
from pipeline.fields import AugmentConfig
from pipeline.training.rand_augment import rand_augment

_MASK = (1 << 64) - 1
_CROP_TRIES = 10  # as torchvision and TensorFlow
_BILINEAR = Image.Resampling.BILINEAR
_LEVELS = np.arange(256, dtype=np.float64)


@dataclass(frozen=True)
class TrainTransform:
    """A noised training view; call it with an image and a seed.

    `random_resized_crop` is Inception's crop, for photos. `pad_crop` is for small images, which it never resizes:
    centred in the view, then shifted by up to ± `pad` px (4 at 32 px is CIFAR's usual crop). Outside the image is
    black, except in RandAugment, where it is grey.

    Attributes:
        interpolation: of random_resized_crop; the affine map and RandAugment are bilinear.
        mean: of the pixels, in 0 to 1: the colour of cut-outs, which is 0 to the model.
    """

    augment: AugmentConfig
    image_size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]

    def __call__(self, image: Pixels, seed: int) -> torch.Tensor:
        """Map uint8 (H, W, 3) to uint8 (3, image_size, image_size), contiguous. Equal arguments, equal pixels.

        The image must be writable, as `decode` makes it, or torch warns; it is not written to.
        """
        config, generator = self.augment, random.Random(seed)
        view = self._geometry(image, generator)
        if generator.random() < config.hflip:
            view = view[:, ::-1]
        if config.num_ops:
            picture = Image.fromarray(np.ascontiguousarray(view))
            view = np.array(rand_augment(picture, config.num_ops, config.magnitude, generator))
        if config.brightness or config.contrast:
            view = _jitter(view, 1 + _spread(generator, config.brightness), 1 + _spread(generator, config.contrast))
        if config.cutout:
            view = _cut_out(view, config.cutout, self.mean, generator)
        return torch.from_numpy(np.array(view.transpose(2, 0, 1), order="C"))

    def _geometry(self, image: Pixels, generator: random.Random) -> Pixels:
        config, size = self.augment, self.image_size
        top = left = 0
        if config.crop == "random_resized_crop":
            box = _crop_box(image.shape[0], image.shape[1], config.crop_scale, config.crop_ratio, generator)
            image = _resize(image[box], size, self.interpolation)
        else:
            top = (image.shape[0] - size) // 2 + _shift(generator, config.pad)
            left = (image.shape[1] - size) // 2 + _shift(generator, config.pad)
        if config.rotation or config.zoom or config.translate or config.shear:
            matrix = _affine_matrix(config, top, left, size, generator)
            picture = Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, matrix, _BILINEAR)
            return np.array(picture)
        return window(image, top, left, size) if config.crop == "pad_crop" else image


def _spread(generator: random.Random, half_width: float) -> float:
    """Evenly from ± half_width."""
    return (2 * generator.random() - 1) * half_width


def _shift(generator: random.Random, pad: int) -> int:
    """A whole number from −pad to pad."""
    return int(generator.random() * (2 * pad + 1)) - pad


def _crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: random.Random
) -> tuple[slice, slice]:
    """Rows and columns of Inception's random crop, by the rules of torchvision's RandomResizedCrop."""
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


def _resize(image: Pixels, size: int, interpolation: str) -> Pixels:
    """Antialiased; torch's uint8 kernel takes a third of the time of Pillow's and differs by a level here and there."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, (size, size), mode=interpolation, antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _affine_matrix(
    config: AugmentConfig, top: int, left: int, size: int, generator: random.Random
) -> tuple[float, float, float, float, float, float]:
    """From the view's pixels to the image's, whose (left, top) the view would begin at without it; about the centre."""
    angle = math.radians(_spread(generator, config.rotation))
    zoom = 1 + _spread(generator, config.zoom)
    shear_x, shear_y = _spread(generator, config.shear), _spread(generator, config.shear)
    right, down = _spread(generator, config.translate) * size, _spread(generator, config.translate) * size
    cos, sin, middle = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    a, b = cos + shear_x * sin, -sin + shear_x * cos
    c, d = sin + shear_y * cos, cos - shear_y * sin
    return a, b, left + right + middle - (a + b) * middle, c, d, top + down + middle - (c + d) * middle


def _jitter(view: Pixels, brightness: float, contrast: float) -> Pixels:
    """Multiply the pixels by `brightness`, and their distance from the view's mean by `contrast`."""
    mean = float(view.mean())
    table = np.clip(brightness * (contrast * (_LEVELS - mean) + mean) + 0.5, 0, 255).astype(np.uint8)
    # bytes.translate is four times as fast as indexing the table.
    return np.frombuffer(bytearray(view.tobytes()).translate(table.tobytes()), np.uint8).reshape(view.shape)


def _cut_out(view: Pixels, side: int, mean: tuple[float, float, float], generator: random.Random) -> Pixels:
    """Cover a square whose centre is anywhere in the view (arXiv 1708.04552), in place: a view is never the image."""
    top = int(generator.random() * view.shape[0]) - side // 2
    left = int(generator.random() * view.shape[1]) - side // 2
    view[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = [round(255 * level) for level in mean]
    return view


def sample_seed(*parts: int) -> int:
    """The seed of one view: 64 bits from (seed, stream, epoch, shard, ordinal, copy).

    It depends on nothing else: not on workers, ranks, batches, or the order in which views are made. Each part passes
    through SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def normalize(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(batch / 255 − mean) / std per channel, on the batch's device.

    Args:
        batch: uint8 (N, C, H, W).

    Returns:
        float32 (N, C, H, W), in the batch's memory format.
    """
    scale = torch.tensor([1 / (255 * value) for value in std], device=batch.device).view(-1, 1, 1)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=batch.device).view(-1, 1, 1)
    return batch.float().mul_(scale).sub_(offset)
