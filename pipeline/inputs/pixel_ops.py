"""RandAugment's operations on batches of uint8 images, on any device: Pillow's pixels, several times as fast.

Most operations change a level into a level and are tables. Geometric ones are bilinear and may differ from Pillow's by one level
in a pixel of a hundred, since they are computed in float32; all others are exact.

Every function maps uint8 (N, 3, H, W) to the same and leaves its input as it is.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch.nn import functional

_GREY = 128  # outside of the image, as published
_GREY_PARTS = (
    19595.0,
    38470.0,
    7471.0,
)  # of red, green and blue in a grey value (ITU-R BT.601), times 2**16, as in Pillow
_ROUNDING = 1 / 256  # pixels are cut off, not rounded, as in Pillow; more than the error of a bilinear value here
_EXACT = (
    1 << 15
)  # fractions of a pixel are multiples of its inverse: float32 is then exact, and the same in batches of any size

Matrix = tuple[float, float, float, float, float, float]


def auto_contrast(images: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to 0 … 255."""
    planes = images.flatten(0, 1).flatten(1)
    low, high = (bound.double()[:, None] for bound in (planes.amin(1), planes.amax(1)))
    scale = low.new_full((), 255.0) / (high - low).clamp(min=1)  # `255 / tensor` would multiply by a rounded reciprocal
    stretched = (_levels(images) * scale - low * scale).clamp(0, 255)
    return look_up(images, _bytes(torch.where(high > low, stretched, _levels(images).double())))


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Make each channel's histogram even, by Pillow's integer rule."""
    counts = _histograms(images.flatten(0, 1).flatten(1))
    last = counts.gather(1, 255 - (counts > 0).flip(1).long().argmax(1, keepdim=True))  # count of the brightest level
    step = (counts.sum(1, keepdim=True) - last) // 255
    below = counts.cumsum(1) - counts
    even = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return look_up(images, _bytes(torch.where(step > 0, even, _levels(images))))


def invert(images: torch.Tensor) -> torch.Tensor:
    """Negative."""
    return ~images


def posterize(images: torch.Tensor, bits: int) -> torch.Tensor:
    """Keep the highest `bits` of each level; all of them from 8 on."""
    return images & (0xFF << max(0, 8 - bits) & 0xFF)


def solarize(images: torch.Tensor, threshold: int) -> torch.Tensor:
    """Invert the levels from `threshold` on."""
    levels = _levels(images)
    return look_up(images, _bytes(torch.where(levels < threshold, levels, 255 - levels))) if threshold < 256 else images


def solarize_add(images: torch.Tensor, addend: int) -> torch.Tensor:
    """Make the levels below 128 brighter."""
    levels = _levels(images)
    return look_up(images, _bytes(torch.where(levels < 128, (levels + addend).clamp(max=255), levels)))


def brightness(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from black (factor > 1) or towards it."""
    return look_up(images, _blend(torch.zeros(1, device=images.device), _levels(images), factor))


def contrast(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from the image's mean grey value, or towards it."""
    total = _grey(images).sum((1, 2, 3), dtype=torch.float64)
    mean = (total / images[0, 0].numel() + 0.5).floor().float()[:, None]
    return look_up(images, _blend(mean, _levels(images), factor))


def color(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from grey, or towards it."""
    return _blend(_grey(images), images, factor)


def sharpness(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from the image smoothed by a 3 × 3 kernel, or towards it. Pixels at the border stay."""
    rows = images.to(torch.int16)
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    total = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).float()
    smooth = images.float()
    centre = smooth[:, :, 1:-1, 1:-1]
    centre.copy_(total.add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_())
    return _blend(smooth, images, factor)


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Counterclockwise, about the centre."""
    cos, sin = (round(f(math.radians(degrees)), 15) for f in (math.cos, math.sin))
    x, y = images.shape[3] / 2, images.shape[2] / 2
    return affine(images, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def shear_x(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move rows left, the lower the further."""
    return affine(images, (1, factor, 0, 0, 1, 0))


def shear_y(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move columns up, the further right the further."""
    return affine(images, (1, 0, 0, factor, 1, 0))


def translate_x(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Move left by a fraction of the width."""
    return _translate(images, 3, fraction * images.shape[3])


def translate_y(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Move up by a fraction of the height."""
    return _translate(images, 2, fraction * images.shape[2])


def _translate(images: torch.Tensor, dim: int, distance: float) -> torch.Tensor:
    """As `affine`, of what comes from inside the image only: at magnitude 15 a third of it."""
    size, whole = images.shape[dim], math.floor(distance)
    first, last = max(0, math.ceil(-distance - 0.5)), min(size, math.ceil(size - distance - 0.5))
    result = torch.full_like(images, _GREY)
    if first < last:
        edges = images.narrow(dim, 0, 1), images, images.narrow(dim, size - 1, 1)
        padded = torch.cat(edges, dim)  # begins one pixel outside
        near, far = (padded.narrow(dim, first + whole + side, last - first).float() for side in (1, 2))
        part = round((distance - whole) * _EXACT) / _EXACT
        moved = near.lerp_(far, part).add_(_ROUNDING)
        result.narrow(dim, first, last - first).copy_(_bytes(moved))
    return result


def affine(images: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Resample bilinearly where `matrix` maps a pixel of the result to, (x, y) → (ax + by + c, dx + ey + f); grey outside."""
    grid, inside = _grid(matrix, images.shape[2], images.shape[3], images.device)
    grid = grid.expand(len(images), -1, -1, -1)
    pixels = images.float().sub_(_GREY)
    moved = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _bytes(moved.mul_(inside).add_(_GREY + _ROUNDING))


@lru_cache(maxsize=64)
def _grid(matrix: Matrix, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pixels' values come from, float32 (1, H, W, 2) as grid_sample wants it, and 1 or 0 (H, W) for inside or not."""
    a, b, c, d, e, f = matrix
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64)[:, None] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=2)[None]
    return grid.float().to(device), inside.float().to(device)


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace each level by a table's entry.

    Args:
        tables: uint8 (256,), (N, 256) for one per image, or (3 N, 256) for one per channel.
    """
    tables = tables.reshape(-1, 256)
    planes = images.reshape(len(tables), -1)
    if images.device.type == "cpu":
        return _look_up_on_cpu(planes, tables).view(images.shape)
    return tables.gather(1, planes.long()).view(images.shape)


def _look_up_on_cpu(planes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """bytes.translate takes a third of the time of torch's gather."""
    rows = zip(planes.numpy(), tables.numpy(), strict=True)
    translated = bytearray().join([bytearray(plane).translate(table.tobytes()) for plane, table in rows])
    return torch.frombuffer(translated, dtype=torch.uint8)


def _histograms(planes: torch.Tensor) -> torch.Tensor:
    """Counts of the levels, int64 (P, 256), of uint8 (P, pixels)."""
    if planes.device.type == "cpu":  # several times as fast as scatter_add there
        return torch.stack([plane.bincount(minlength=256) for plane in planes])
    counts = torch.zeros(len(planes), 256, dtype=torch.int64, device=planes.device)
    return counts.scatter_add_(1, planes.long(), torch.ones_like(counts[:, :1]).expand(planes.shape))


def _levels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Grey values as Pillow's, whole numbers in float32 (N, 1, H, W); all sums here are exact."""
    red, green, blue = (channel.float() for channel in images.split(1, dim=1))
    total = red.mul_(_GREY_PARTS[0]).add_(green, alpha=_GREY_PARTS[1]).add_(blue, alpha=_GREY_PARTS[2])
    return total.add_(1 << 15).mul_(1 / (1 << 16)).floor_()


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: float) -> torch.Tensor:
    """degenerate + factor × (images − degenerate), cut off to uint8, in Pillow's order of rounding."""
    return _bytes((images.float() - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255))


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """Cut off to uint8, by way of int16: five times as fast on a CPU."""
    return values.to(torch.int16).to(torch.uint8)
