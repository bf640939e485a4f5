"""Operations on batches of uint8 images, on any device, for RandAugment and for views: Pillow's pixels, several times as fast.

Most operations map a level to a level, by a table. All give exactly Pillow's pixels, except geometric ones, which are bilinear, in
float32, and differ by one level in about one of a hundred pixels; and `hue` and `blur`, which are torchvision's, rounded to levels.

Every function maps uint8 (N, 3, H, W) to uint8 (N, 3, H, W), and does not write to its input. A `Factor` is one number for all images,
or float32 (N, 1), one for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch.nn import functional

_GREY = 128  # outside of the image, as published
# Shares of red, green and blue in a grey value (ITU-R BT.601), times 2**16, as in Pillow.
_GREY_PARTS = (19595.0, 38470.0, 7471.0)
# Added before values are cut off to whole levels, as Pillow does; more than the rounding error of a bilinear value here.
_ROUNDING = 1 / 256
# Fractions of a pixel are multiples of 1 / _EXACT: float32 is then exact, and independent of the batch size.
_EXACT = 1 << 15

# Parts of a kernel are multiples of 1 / _KERNEL, and pixels between its two passes multiples of 1 / _BETWEEN, so that all sums are
# exact in float32: 255 × _KERNEL × _BETWEEN < 2**24.
_KERNEL, _BETWEEN = 1 << 12, 1 << 4

_GATHERED_AT_ONCE = 1 << 26  # pixels; half a gigabyte of int64

Matrix = tuple[float, float, float, float, float, float]
Factor = float | torch.Tensor


def auto_contrast(images: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to levels 0 to 255."""
    planes = images.flatten(0, 1).flatten(1)
    low, high = (bound.double()[:, None] for bound in (planes.amin(1), planes.amax(1)))
    scale = low.new_full((), 255.0) / (high - low).clamp(min=1)  # `255 / tensor` would multiply by a rounded reciprocal
    stretched = (_levels(images) * scale - low * scale).clamp(0, 255)
    return look_up(images, to_bytes(torch.where(high > low, stretched, _levels(images).double())))


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Equalize each channel's histogram, by Pillow's integer rule."""
    counts = _histograms(images.flatten(0, 1).flatten(1))
    last = counts.gather(1, 255 - (counts > 0).flip(1).long().argmax(1, keepdim=True))  # count of the brightest level
    step = (counts.sum(1, keepdim=True) - last) // 255
    below = counts.cumsum(1) - counts
    even = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return look_up(images, to_bytes(torch.where(step > 0, even, _levels(images))))


def invert(images: torch.Tensor) -> torch.Tensor:
    """Replace each level by 255 − level."""
    return ~images


def posterize(images: torch.Tensor, bits: int) -> torch.Tensor:
    """Keep the highest `bits` bits of each level."""
    return images & (0xFF << max(0, 8 - bits) & 0xFF)


def solarize(images: torch.Tensor, threshold: int) -> torch.Tensor:
    """Invert levels ≥ `threshold`."""
    levels = _levels(images)
    return (
        look_up(images, to_bytes(torch.where(levels < threshold, levels, 255 - levels))) if threshold < 256 else images
    )


def solarize_add(images: torch.Tensor, addend: int) -> torch.Tensor:
    """Add to levels < 128."""
    levels = _levels(images)
    return look_up(images, to_bytes(torch.where(levels < 128, (levels + addend).clamp(max=255), levels)))


def brightness(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Move away from black (factor > 1), or towards it (factor < 1)."""
    black = torch.zeros_like(factor) if isinstance(factor, torch.Tensor) else torch.zeros(1, device=images.device)
    return look_up(images, _blend(black, _levels(images), factor))


def contrast(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Move away from the image's mean grey value, or towards it."""
    total = _grey(images).sum((1, 2, 3), dtype=torch.float64)
    mean = (total / images[0, 0].numel() + 0.5).floor().float()[:, None]
    return look_up(images, _blend(mean, _levels(images), factor))


def color(images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Move away from grey, or towards it."""
    return _blend(_grey(images), images, of_images(factor))


def grey(images: torch.Tensor) -> torch.Tensor:
    """Replace colours by their grey values."""
    return to_bytes(_grey(images)).repeat(1, 3, 1, 1)


def hue(images: torch.Tensor, turn: Factor) -> torch.Tensor:
    """Turn each colour by a part of the colour circle, −1 to 1; its value and saturation (HSV) stay."""
    red, green, blue = images.split(1, dim=1)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma, r, g, b = (high - low).float(), red.float(), green.float(), blue.float()
    from_green, from_blue = (b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4)
    angle = torch.where(red == high, g - b, torch.where(green == high, from_green, from_blue))  # 0 to 6, times chroma
    angle = angle.div_(chroma.clamp(min=1)).add_(6 * of_images(turn)).remainder_(6)
    centre, sign, top = _hue_ramps(images.device)
    share = (angle - centre).abs_().mul_(sign).add_(top).clamp_(0, 1)
    return to_bytes(share.mul_(chroma).add_(low).add_(0.5))


@lru_cache(maxsize=8)
def _hue_ramps(device: torch.device) -> torch.Tensor:
    """Red, green and blue of a pure colour at angle a (0 to 6) are |a − centre| × sign + top, cut off to 0…1: (3, 1, 3, 1, 1)."""
    ramps = torch.tensor([[3.0, 2.0, 4.0], [1.0, -1.0, -1.0], [-1.0, 2.0, 2.0]])
    return ramps.to(device).view(3, 1, 3, 1, 1)


def gaussian_taps(side: int, sigma: float) -> tuple[int, ...]:
    """The middle and one half of SimCLR's blur kernel, times _KERNEL: a tenth of the image's side wide, made odd; it sums to _KERNEL.

    Args:
        side: of the image, pixels.
        sigma: of the Gaussian, pixels.
    """
    half = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(1, side // 10 // 2 + 1)]
    outer = [round(_KERNEL * part / (1 + 2 * sum(half))) for part in half]
    return _KERNEL - 2 * sum(outer), *(part for part in outer if part)  # they fall with the distance


def blur(images: torch.Tensor, *taps: Factor) -> torch.Tensor:
    """Smooth by a symmetric kernel, down and then across; images are mirrored at their borders.

    Args:
        taps: weights of the pixel itself and of those at distance 1, 2, …; see `gaussian_taps`.
    """
    down = _smooth(images.float(), 2, taps).mul_(_BETWEEN / _KERNEL).add_(0.5).floor_()
    return to_bytes(_smooth(down, 3, taps).mul_(1 / (_KERNEL * _BETWEEN)).add_(0.5))


def _smooth(images: torch.Tensor, dim: int, taps: Sequence[Factor]) -> torch.Tensor:
    """Sum of the pixels along a dimension, weighted by the taps, float32."""
    length, reach = images.shape[dim], len(taps) - 1
    padded = functional.pad(images, (0, 0, reach, reach) if dim == 2 else (reach, reach, 0, 0), mode="reflect")
    total = images * of_images(taps[0])
    for distance, tap in enumerate(taps[1:], 1):
        pair = padded.narrow(dim, reach - distance, length) + padded.narrow(dim, reach + distance, length)
        total.add_(pair.mul_(of_images(tap)))
    return total


def of_images(factor: Factor) -> Factor:
    """A factor in the shape that multiplies images: (N, 1, 1, 1), or one number."""
    return factor[:, :, None, None] if isinstance(factor, torch.Tensor) else factor


def sharpness(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move away from the image smoothed by a 3 × 3 kernel, or towards it. Border pixels stay."""
    rows = images.to(torch.int16)
    rows = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    total = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).float()
    smooth = images.float()
    centre = smooth[:, :, 1:-1, 1:-1]
    centre.copy_(total.add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_())
    return _blend(smooth, images, factor)


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Rotate counterclockwise, about the centre."""
    cos, sin = (round(f(math.radians(degrees)), 15) for f in (math.cos, math.sin))
    x, y = images.shape[3] / 2, images.shape[2] / 2
    return affine(images, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def shear_x(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move rows left, lower ones further."""
    return affine(images, (1, factor, 0, 0, 1, 0))


def shear_y(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Move columns up, right ones further."""
    return affine(images, (1, 0, 0, factor, 1, 0))


def translate_x(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Move left by a fraction of the width."""
    return _translate(images, 3, fraction * images.shape[3])


def translate_y(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Move up by a fraction of the height."""
    return _translate(images, 2, fraction * images.shape[2])


def _translate(images: torch.Tensor, dim: int, distance: float) -> torch.Tensor:
    """Translate like `affine`, but compute only pixels from inside the image: a third of them at magnitude 15."""
    size, whole = images.shape[dim], math.floor(distance)
    first, last = max(0, math.ceil(-distance - 0.5)), min(size, math.ceil(size - distance - 0.5))
    result = torch.full_like(images, _GREY)
    if first < last:
        edges = images.narrow(dim, 0, 1), images, images.narrow(dim, size - 1, 1)
        padded = torch.cat(edges, dim)  # begins one pixel outside
        near, far = (padded.narrow(dim, first + whole + side, last - first).float() for side in (1, 2))
        part = round((distance - whole) * _EXACT) / _EXACT
        moved = near.lerp_(far, part).add_(_ROUNDING)
        result.narrow(dim, first, last - first).copy_(to_bytes(moved))
    return result


def affine(images: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Resample bilinearly: pixel (x, y) of the result comes from (ax + by + c, dx + ey + f) of the image; grey outside."""
    grid, inside = _grid(matrix, images.shape[2], images.shape[3], images.device)
    grid = grid.expand(len(images), -1, -1, -1)
    pixels = images.float().sub_(_GREY)
    moved = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return to_bytes(moved.mul_(inside).add_(_GREY + _ROUNDING))


@lru_cache(maxsize=64)
def _grid(matrix: Matrix, height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Source coordinates of the pixels, float32 (1, H, W, 2) for grid_sample, and 1 inside the image, 0 outside, float32 (H, W)."""
    a, b, c, d, e, f = matrix
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64)[:, None] + 0.5
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    grid = torch.stack([2 * from_x / width - 1, 2 * from_y / height - 1], dim=2)[None]
    return grid.float().to(device), inside.float().to(device)


def look_up(images: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Replace each level by its entry in a table.

    Args:
        tables: uint8, (256,) for all images, (N, 256) per image, or (3 N, 256) per channel.
    """
    tables = tables.reshape(-1, 256)
    planes = images.reshape(len(tables), -1)
    found = _look_up_on_cpu(planes, tables) if _is_on_cpu(images) else _gather(planes, tables)
    return found.view(images.shape)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device, in order with the device's work; the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _is_on_cpu(images: torch.Tensor) -> bool:
    return images.device.type == "cpu"


def _gather(planes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """`look_up` on a GPU. In parts, because torch's gather wants levels as int64: eight times the images' memory."""
    rows = max(1, _GATHERED_AT_ONCE // planes.shape[1])
    parts = zip(planes.split(rows), tables.split(rows), strict=True)
    return torch.cat([table.gather(1, plane.long()) for plane, table in parts])


def _look_up_on_cpu(planes: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """`look_up` with bytes.translate, in a third of the time of torch's gather."""
    rows = zip(planes.numpy(), tables.numpy(), strict=True)
    translated = bytearray().join([bytearray(plane).translate(table.tobytes()) for plane, table in rows])
    return torch.frombuffer(translated, dtype=torch.uint8)


def _histograms(planes: torch.Tensor) -> torch.Tensor:
    """Count the levels: uint8 (P, pixels) to int64 (P, 256)."""
    if _is_on_cpu(planes):  # several times as fast as scatter_add on a CPU
        return torch.stack([plane.bincount(minlength=256) for plane in planes])
    counts = torch.zeros(len(planes), 256, dtype=torch.int64, device=planes.device)
    return counts.scatter_add_(1, planes.long(), torch.ones_like(counts[:, :1]).expand(planes.shape))


def _levels(images: torch.Tensor) -> torch.Tensor:
    return torch.arange(256, device=images.device)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Pillow's grey values, whole numbers in float32 (N, 1, H, W); all sums are exact."""
    red, green, blue = (channel.float() for channel in images.split(1, dim=1))
    total = red.mul_(_GREY_PARTS[0]).add_(green, alpha=_GREY_PARTS[1]).add_(blue, alpha=_GREY_PARTS[2])
    return total.add_(1 << 15).mul_(1 / (1 << 16)).floor_()


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: Factor) -> torch.Tensor:
    """degenerate + factor × (images − degenerate), cut off to uint8, with Pillow's order of rounding."""
    return to_bytes((images.float() - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255))


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Cut off to uint8, through int16: five times as fast on a CPU."""
    return values.to(torch.int16).to(torch.uint8)
