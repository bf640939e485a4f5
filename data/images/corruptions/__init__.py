"""Test images under the 15 common corruptions of ImageNet-C, each at 5 severities (arXiv 1903.12261).

The constants are the released ones: CIFAR-10-C's, made for 32 px, for images whose shorter side has at most 64 px, else
ImageNet-C's, made for 224 px. Lengths in pixels scale with the shorter side. ImageNet-C's images were finally stored as JPEG of
quality 85; these are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..decode import Pixels
from . import effects
from .filters import Floats

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 64  # pixels; up to here CIFAR-10-C's constants, made for half of it
_Effect = Callable[..., Floats]
_Rows = tuple[Any, ...]  # one constant, or a tuple of them, per severity

_IMAGENET_SIDE, _CIFAR_SIDE = 224, 32
_TABLE: Mapping[str, tuple[_Effect, _Rows, _Rows]] = {  # name: effect, ImageNet-C's constants, CIFAR-10-C's
    "gaussian_noise": (effects.gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (effects.shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": (effects.impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        effects.defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": (
        effects.glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (
        effects.motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": (
        effects.zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": (
        effects.snow,
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ),
    "frost": (
        effects.frost,
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": (
        effects.fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": (effects.brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (effects.contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        effects.elastic_transform,
        ((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88)),
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    "pixelate": (effects.pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (effects.jpeg_compression, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
}  # fmt: skip

CORRUPTIONS = tuple(_TABLE)
"""Names, in the paper's order: noise, blur, weather, digital."""


def corrupt(image: Pixels, name: str, severity: int, seed: Sequence[int]) -> Pixels:
    """Corrupt an image; equal arguments give equal pixels.

    Args:
        image: uint8 (H, W, 3).
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        seed: non-negative integers that identify the run and the sample.

    Returns:
        uint8 (H, W, 3).
    """
    side = min(image.shape[:2])
    effect, imagenet, cifar = _TABLE[name]
    rows, made_for = (cifar, _CIFAR_SIDE) if side <= SMALL_SIDE else (imagenet, _IMAGENET_SIDE)
    constants = rows[severity - 1]
    rng = np.random.default_rng([*seed, CORRUPTIONS.index(name), severity])
    values = constants if isinstance(constants, tuple) else (constants,)
    result = effect(image.astype(np.float32) / 255, rng, side / made_for, *values)
    return (result.clip(0, 1) * 255 + 0.5).astype(np.uint8)
