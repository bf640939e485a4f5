"""RandAugment (arXiv 1909.13719): draw operations for an image, and apply them to a batch.

Operations, magnitudes and signs are those of the released code (EfficientNet's and ResNet-RS's), with three differences:

- Without Cutout, one of its sixteen operations; as in timm.
- Translations are a fraction of the side, as in timm; 10 px × magnitude in the released code, which at 224 px is nearly the same.
- Resampling is bilinear, not nearest.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.inputs import pixel_ops

_OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "AutoContrast": pixel_ops.auto_contrast,
    "Equalize": pixel_ops.equalize,
    "Invert": pixel_ops.invert,
    "Rotate": pixel_ops.rotate,
    "Posterize": pixel_ops.posterize,
    "Solarize": pixel_ops.solarize,
    "SolarizeAdd": pixel_ops.solarize_add,
    "Color": pixel_ops.color,
    "Contrast": pixel_ops.contrast,
    "Brightness": pixel_ops.brightness,
    "Sharpness": pixel_ops.sharpness,
    "ShearX": pixel_ops.shear_x,
    "ShearY": pixel_ops.shear_y,
    "TranslateX": pixel_ops.translate_x,
    "TranslateY": pixel_ops.translate_y,
}
NAMES = tuple(_OPERATIONS)
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
"""Operations that are negated with probability ½."""


def draw_operations(num_ops: int, generator: random.Random) -> tuple[int, ...]:
    """Draw `num_ops` operations evenly, with replacement, as codes: 2 × index in NAMES, plus 1 if the sign is negative."""
    return tuple(2 * int(generator.random() * len(NAMES)) + (generator.random() >= 0.5) for _ in range(num_ops))


def arguments(name: str, magnitude: float) -> tuple[float, ...]:
    """Arguments of an operation at a magnitude (may exceed 10); of a signed operation, with positive sign.

    In degrees, bits, levels, factors, or fractions of the side.
    """
    level = magnitude / 10
    if name in ("AutoContrast", "Equalize", "Invert"):
        return ()
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return (level * 1.8 + 0.1,)
    if name in ("Posterize", "Solarize", "SolarizeAdd"):
        return (int(level * {"Posterize": 4, "Solarize": 256, "SolarizeAdd": 110}[name]),)
    return (level * {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}[name],)


def operation_order(drawn: Sequence[Sequence[int]]) -> np.ndarray:
    """For each operation (a column), the images of a batch sorted by code: row numbers, int64 (N, number of operations)."""
    return np.argsort(np.array(drawn, dtype=np.int64), axis=0, kind="stable")


def rand_augment(
    images: torch.Tensor, drawn: Sequence[Sequence[int]], magnitude: float, order: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Apply to each image its operations. An image's result does not depend on the others in the batch.

    Images with the same operation are one batch for it.

    Args:
        images: uint8 (N, 3, H, W), on any device; not written to.
        drawn: per image the codes of `draw_operations`, the same number for all.
        order: the rows of `operation_order`, on the images' device; None: on the CPU.

    Returns:
        uint8 (N, 3, H, W).
    """
    for number, codes in enumerate(zip(*drawn, strict=True)):
        counts = sorted(Counter(codes).items())
        if len(counts) == 1:
            images = _operate(images, codes[0], magnitude)
            continue
        order = torch.from_numpy(operation_order(drawn)).unbind(1) if order is None else order
        groups = order[number].split([count for _, count in counts])
        result = torch.empty_like(images)
        for (code, _), rows in zip(counts, groups, strict=True):
            result.index_copy_(0, rows, _operate(images.index_select(0, rows), code, magnitude))
        images = result
    return images


def _operate(images: torch.Tensor, code: int, magnitude: float) -> torch.Tensor:
    name, negative = NAMES[code // 2], code % 2
    values = arguments(name, magnitude)
    if negative and name in SIGNED:
        values = tuple(-value for value in values)
    return _OPERATIONS[name](images, *values)
