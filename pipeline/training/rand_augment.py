"""RandAugment (arXiv 1909.13719) with timm's operations and magnitudes, and randomness of its own.

timm draws from the global generators of `random` and `numpy`. Here an operation's two variants (of either sign) are
prepared once, and a sample's own generator picks among them: same seed, same pixels, in any thread or process.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP

NAMES = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
"""The published operations without Cutout, as in timm's `rand-…` without `inc`."""

_SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
_TRANSLATE_FRACTION = 0.45  # of the side at magnitude 10: timm's default
_GREY = (128, 128, 128)
# Published: nearest. timm: bilinear or bicubic at random. Bicubic takes twice as long.
_BILINEAR = Image.Resampling.BILINEAR


class Operation(NamedTuple):
    """One operation at one magnitude: what an image goes through on either toss of the coin."""

    name: str
    positive: Callable[[Image.Image], Image.Image]
    negative: Callable[[Image.Image], Image.Image]


@lru_cache(maxsize=64)
def operations(magnitude: float) -> tuple[Operation, ...]:
    """The operations at a magnitude, which is not clipped at 10: Rotate, for one, turns by ±3° × magnitude."""
    return tuple(_operation(name, magnitude) for name in NAMES)


def _operation(name: str, magnitude: float) -> Operation:
    arguments = level_arguments(name, magnitude)
    negated = tuple(-argument for argument in arguments) if name in _SIGNED else arguments
    apply = cast(Callable[..., Image.Image], NAME_TO_OP[name])
    return Operation(
        name,
        lambda image: apply(image, *arguments, fillcolor=_GREY, resample=_BILINEAR),
        lambda image: apply(image, *negated, fillcolor=_GREY, resample=_BILINEAR),
    )


def level_arguments(name: str, magnitude: float) -> tuple[float, ...]:
    """What timm's operation is called with at a magnitude; the positive one where the sign is random."""
    level = LEVEL_TO_ARG[name]
    if level is None:
        return ()
    state = random.getstate()  # timm tosses a coin for the sign; the caller's generator must not notice
    arguments = level(magnitude, {"translate_pct": _TRANSLATE_FRACTION})
    random.setstate(state)
    return tuple(abs(argument) for argument in arguments)


def rand_augment(image: Image.Image, num_ops: int, magnitude: float, generator: random.Random) -> Image.Image:
    """Apply `num_ops` operations, drawn with replacement, each surely; two draws from `generator` per operation.

    Args:
        image: RGB.
    """
    choices = operations(magnitude)
    for _ in range(num_ops):
        operation = choices[int(generator.random() * len(choices))]
        image = operation.positive(image) if generator.random() < 0.5 else operation.negative(image)
    return image
