"""Input noise that needs only the view's pixels: RandAugment, brightness and contrast, distortion, cut-out.

It is drawn per image on the host, and added either there to one image, or on the model's device to a whole batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from pipeline.core.schema import AugmentConfig
from pipeline.inputs.distortion import Distortion, distort, draw_distortion
from pipeline.inputs.pixel_ops import look_up, upload
from pipeline.inputs.rand_augment import draw_operations, operation_order, rand_augment


class Noise(NamedTuple):
    """The noise drawn for one view.

    Attributes:
        operations: of RandAugment, see `draw_operations`.
        factors: of brightness and contrast.
        corner: top and left of the cut-out square, in pixels; may be negative.
        distortion: of a view for self-supervised training.
    """

    operations: tuple[int, ...]
    factors: tuple[float, float]
    corner: tuple[int, int]
    distortion: Distortion = ()


def spread(generator: random.Random, half_width: float) -> float:
    """Draw evenly from ± half_width."""
    return (2 * generator.random() - 1) * half_width


def draw_noise(
    config: AugmentConfig, size: int, generator: random.Random, view: int = 0, is_grey: bool = False
) -> Noise:
    """Draw the noise of a view of size × size pixels; for `view` and `is_grey` see `draw_distortion`."""
    operations = draw_operations(config.num_ops, generator)
    factors, corner = (1.0, 1.0), (0, 0)
    if config.brightness or config.contrast:
        factors = (1 + spread(generator, config.brightness), 1 + spread(generator, config.contrast))
    if config.cutout:
        top, left = (int(generator.random() * size) - config.cutout // 2 for _ in range(2))
        corner = (top, left)
    return Noise(operations, factors, corner, draw_distortion(config, size, generator, view, is_grey))


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
    add = _add_on_cpu if views.device.type == "cpu" else add_on_device
    return add(views, noise, config, mean)


def _add_on_cpu(
    views: torch.Tensor, noise: Sequence[Noise], config: AugmentConfig, mean: tuple[float, float, float]
) -> torch.Tensor:
    if config.num_ops:
        views = rand_augment(views, [each.operations for each in noise], config.magnitude)
    if config.brightness or config.contrast:
        views = _jitter(views, torch.from_numpy(np.array([each.factors for each in noise])))
    views = distort(views, [each.distortion for each in noise])
    return _cut_out(views, noise, config.cutout, mean) if config.cutout else views


def add_on_device(
    views: torch.Tensor, noise: Sequence[Noise], config: AugmentConfig, mean: tuple[float, float, float]
) -> torch.Tensor:
    """`add_noise` in one copy of all that was drawn (two with a distortion), and in a number of kernels that does not grow with that of
    views."""
    factors, corners, order = _upload_noise(noise, views.device)
    if config.num_ops:
        views = rand_augment(views, [each.operations for each in noise], config.magnitude, order)
    if config.brightness or config.contrast:
        views = _jitter(views, factors)
    views = distort(views, [each.distortion for each in noise])
    return _cover(views, corners, config.cutout, mean) if config.cutout else views


def _upload_noise(
    noise: Sequence[Noise], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor]]:
    """Copy what was drawn to a device: factors, float64 (N, 2); corners, int64 (N, 2); the rows of `operation_order`."""
    drawn = np.array([(*each.factors, *each.corner) for each in noise])
    order = operation_order([each.operations for each in noise])
    values = upload(torch.from_numpy(np.concatenate([drawn, order], axis=1)), device)
    return values[:, :2], values[:, 2:4].long(), values[:, 4:].long().unbind(1)


def _jitter(views: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale the pixels' distance from the view's mean by `contrast`, then all by `brightness`; factors (N, 2)."""
    brightness, contrast = factors.split(1, dim=1)
    mean = views.sum((1, 2, 3)).double()[:, None] / views[0].numel()
    levels = torch.arange(256, dtype=torch.float64, device=views.device)
    jittered = (brightness * (contrast * (levels - mean) + mean) + 0.5).clamp(0, 255)
    return look_up(views, jittered.to(torch.uint8))


def _cut_out(views: torch.Tensor, noise: Sequence[Noise], side: int, mean: tuple[float, float, float]) -> torch.Tensor:
    """Cover, in place, a square with its centre anywhere in the view (cutout, arXiv 1708.04552)."""
    color = _color(mean, views.device)
    for view, each in zip(views, noise, strict=True):
        top, left = each.corner
        view[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = color
    return views


def _cover(views: torch.Tensor, corners: torch.Tensor, side: int, mean: tuple[float, float, float]) -> torch.Tensor:
    """`_cut_out` by the same few kernels for any number of views; corners int64 (N, 2)."""
    distance = torch.arange(views.shape[2], device=views.device) - corners[:, :, None]
    down, right = ((distance >= 0) & (distance < side)).unbind(1)  # (N, S) each
    return torch.where((down[:, :, None] & right[:, None, :])[:, None], _color(mean, views.device), views)


@lru_cache(maxsize=16)
def _color(mean: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """uint8 (3, 1, 1), copied to a device once."""
    return torch.tensor([round(255 * level) for level in mean], dtype=torch.uint8).to(device).view(3, 1, 1)
