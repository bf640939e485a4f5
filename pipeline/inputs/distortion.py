"""Distortion of a view for self-supervised training: colour jitter, grey, blur, solarize (SimCLR, arXiv 2002.05709, appendix A; BYOL,
arXiv 2006.07733, appendix B).

    draw (per view, on the host) ──► rounds of (operation, value) ──► distort (a batch, on any device)

Where it differs from the released code of SimCLR: pixels are rounded to 8 bits after each operation, and images are mirrored at their
borders for the blur, where SimCLR's have black there; both as in torchvision.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pipeline.core.schema import AugmentConfig, ViewsConfig
from pipeline.inputs import pixel_ops

Round = tuple[str, tuple[float, ...]]
"""An operation and its values; the name is empty where the view stays as it is."""
Distortion = tuple[Round, ...]
"""The rounds of a view, in order; as many for every view."""

_STAYS: Round = ("", ())
_RANGES = {"Brightness": 0.8, "Contrast": 0.8, "Saturation": 0.8, "Hue": 0.2}  # at strength 1
_COLORED = ("Saturation", "Hue", "Grey")  # they change no grey image
_SIGMA = (0.1, 2.0)  # pixels
_MIDDLE = 128
_EXACT = 1 << 16  # factors are multiples of 1 / _EXACT, which float32 holds exactly
_OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "Brightness": pixel_ops.brightness,
    "Contrast": pixel_ops.contrast,
    "Saturation": pixel_ops.color,
    "Hue": pixel_ops.hue,
    "Grey": pixel_ops.grey,
    "Blur": pixel_ops.blur,
    "Solarize": lambda images: pixel_ops.solarize(images, _MIDDLE),
}


def draw_distortion(
    config: AugmentConfig, size: int, generator: random.Random, view: int = 0, is_grey: bool = False
) -> Distortion:
    """Draw the distortion of a view of size × size pixels; nothing without `ViewsConfig`.

    Args:
        view: number of the view of its image, 0, 1, …
        is_grey: leave out what would change nothing.
    """
    if not isinstance(config, ViewsConfig):
        return ()
    rounds = [
        *_draw_jitter(config, generator),
        ("Grey", ()) if generator.random() < config.grey else _STAYS,
        _draw_blur(config.blur[view % len(config.blur)], size, generator),
        ("Solarize", ()) if generator.random() < config.solarize[view % len(config.solarize)] else _STAYS,
    ]
    return tuple(_STAYS if is_grey and name in _COLORED else (name, values) for name, values in rounds)


def _draw_jitter(config: ViewsConfig, generator: random.Random) -> list[Round]:
    """Draw the four factors and their order."""
    jitters = generator.random() < config.color_jitter_prob and config.color_jitter > 0
    rounds: list[Round] = []
    for name, width in _RANGES.items():
        width *= config.color_jitter
        low, high = (-width, width) if name == "Hue" else (max(0.0, 1 - width), 1 + width)
        value = low + (high - low) * generator.random()
        rounds.append((name, (round(value * _EXACT) / _EXACT,)))
    places = [generator.random() for _ in rounds]
    ordered = [drawn for _, drawn in sorted(zip(places, rounds, strict=True))]
    return ordered if jitters else [_STAYS] * len(ordered)


def _draw_blur(probability: float, size: int, generator: random.Random) -> Round:
    blurs = generator.random() < probability
    taps = pixel_ops.gaussian_taps(size, _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * generator.random())
    return ("Blur", taps) if blurs and any(taps[1:]) else _STAYS


def distort(views: torch.Tensor, drawn: Sequence[Distortion]) -> torch.Tensor:
    """Apply to each view its rounds. A view's pixels do not depend on the others in the batch, nor on the device.

    Views with the same operation in a round are one batch for it.

    Args:
        views: uint8 (N, 3, S, S), on any device; may be overwritten.
        drawn: per view; all with the same number of rounds.

    Returns:
        uint8 (N, 3, S, S).
    """
    if len(views) == 1:  # without copies
        for name, values in drawn[0]:
            views = _OPERATIONS[name](views, *values) if name else views
        return views
    for name, rows, columns in _upload_groups(drawn, views.device):
        part = views.index_select(0, rows)
        views.index_copy_(0, rows, _OPERATIONS[name](part, *columns))
    return views


def _upload_groups(
    drawn: Sequence[Distortion], device: torch.device
) -> Iterator[tuple[str, torch.Tensor, Sequence[torch.Tensor]]]:
    """Yield, round by round, each operation, the rows that have it, int64 (M,), and their values, float32 (M, 1) each.

    All are copied to the device at once.
    """
    groups = [group for rounds in zip(*drawn, strict=True) for group in _groups(rounds)]
    if not groups:
        return
    width = max(values.shape[1] for _, _, values in groups)
    table = np.concatenate(
        [np.column_stack([rows, np.pad(values, ((0, 0), (0, width - values.shape[1])))]) for _, rows, values in groups]
    )
    uploaded = pixel_ops.upload(torch.from_numpy(table), device).split([len(rows) for _, rows, _ in groups])
    for (name, _, values), part in zip(groups, uploaded, strict=True):
        yield name, part[:, 0].long(), [part[:, 1 + column, None] for column in range(values.shape[1])]


def _groups(rounds: Sequence[Round]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The operations of one round: name, rows, and values padded with 0, float32 (M, number of values)."""
    for name in _OPERATIONS:
        rows = [row for row, (drawn, _) in enumerate(rounds) if drawn == name]
        if rows:
            width = max(len(rounds[row][1]) for row in rows)
            values = [(*rounds[row][1], *[0.0] * (width - len(rounds[row][1]))) for row in rows]
            yield name, np.array(rows, np.float32), np.array(values, np.float32).reshape(len(rows), width)
