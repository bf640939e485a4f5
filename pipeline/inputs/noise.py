"""Input noise that needs only the view's pixels: RandAugment, brightness and contrast, cut-out.

It is drawn per image on the host, and added either there to one image, or on the model's device to a whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pipeline.core.schema import AugmentConfig
from pipeline.inputs.pixel_ops import look_up
from pipeline.inputs.rand_augment import draw_operations, rand_augment


class Noise(NamedTuple):
    """The noise drawn for one view.

    Attributes:
        operations: of RandAugment, see `draw_operations`.
        factors: of brightness and contrast.
        corner: top and left of the cut-out square, in pixels; may be negative.
    """

    operations: tuple[int, ...]
    factors: tuple[float, float]
    corner: tuple[int, int]


def spread(generator: random.Random, half_width: float) -> float:
    """Draw evenly from ± half_width."""
    return (2 * generator.random() - 1) * half_width


def draw_noise(config: AugmentConfig, size: int, generator: random.Random) -> Noise:
    """Draw the noise of a view of size × size pixels."""
    operations = draw_operations(config.num_ops, generator)
    factors, corner = (1.0, 1.0), (0, 0)
    if config.brightness or config.contrast:
        factors = (1 + spread(generator, config.brightness), 1 + spread(generator, config.contrast))
    if config.cutout:
        top, left = (int(generator.random() * size) - config.cutout // 2 for _ in range(2))
        corner = (top, left)
    return Noise(operations, factors, corner)


def add_noise(
    views: torch.Tensor, noise: Sequence[Noise], config: AugmentConfig, mean: tuple[float, float, float]
) -> torch.Tensor:
    """Add to each view its noise. On a CPU, a view's pixels do not depend on the batch.

    Args:
        views: uint8 (N, 3, S, S), on any device; may be overwritten.
        noise: one per view.
        mean: colour of cut-outs, in 0 to 1.

    Returns:
        uint8 (N, 3, S, S).
    """
    if config.num_ops:
        views = rand_augment(views, [each.operations for each in noise], config.magnitude)
    if config.brightness or config.contrast:
        views = _jitter(views, torch.tensor([each.factors for each in noise], dtype=torch.float64))
    if config.cutout:
        views = _cut_out(views, [each.corner for each in noise], config.cutout, mean)
    return views


def _jitter(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale the pixels' distance from the view's mean by `contrast`, then all by `brightness`; factors (N, 2)."""
    brightness, contrast = factors.to(views.device).split(1, dim=1)
    mean = views.sum((1, 2, 3)).double()[:, None] / views[0].numel()
    levels = torch.arange(256, dtype=torch.float64, device=views.device)
    jittered = (brightness * (contrast * (levels - mean) + mean) + 0.5).clamp(0, 255)
    return look_up(views, jittered.to(torch.uint8))


def _cut_out(
    views: torch.Tensor, corners: Sequence[tuple[int, int]], side: int, mean: tuple[float, float, float]
) -> torch.Tensor:
    """Cover, in place, a square with its centre anywhere in the view (cutout, arXiv 1708.04552)."""
    color = torch.tensor([round(255 * level) for level in mean], dtype=torch.uint8).to(views.device).view(3, 1, 1)
    for view, (top, left) in zip(views, corners, strict=True):
        view[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = color
    return views
