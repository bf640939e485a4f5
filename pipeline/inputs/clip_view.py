"""The training view of a clip: one crop, one flip and one draw of RandAugment for all its frames (recipe of 3D ResNet-RS)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pipeline.inputs.crop import crop_box
from pipeline.inputs.rand_augment import draw_operations, rand_augment


@dataclass(frozen=True)
class ClipView:
    """Makes training views, a function of frames and generator alone. Defaults are the released code's.

    Attributes:
        size: height and width of the view, in pixels.
        crop_scale: range of the crop's share of the area.
        crop_ratio: range of the crop's width / height.
        hflip: probability of a flip.
        num_ops: operations of RandAugment.
        magnitude: of RandAugment; 10 is the usual maximum.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (0.5, 2.0)
    hflip: float = 0.5
    num_ops: int = 0
    magnitude: float = 10.0

    def __call__(self, frames: np.ndarray, generator: random.Random) -> torch.Tensor:
        """uint8 (T, H, W, 3), not written to → uint8 (3, T, size, size), contiguous."""
        height, width = frames.shape[1:3]
        rows, columns = crop_box(height, width, self.crop_scale, self.crop_ratio, generator)
        flipped = generator.random() < self.hflip
        cropped = np.array(frames[:, rows, columns])
        pixels = torch.from_numpy(cropped).permute(0, 3, 1, 2)
        shape = (self.size, self.size)
        view = functional.interpolate(pixels, shape, mode="bilinear", antialias=True, align_corners=False)
        view = view.flip(3) if flipped else view
        if self.num_ops:
            view = rand_augment(
                view.contiguous(), [draw_operations(self.num_ops, generator)] * len(view), self.magnitude
            )
        return view.transpose(0, 1).contiguous()


def draw_frames(num_frames: int, frames: int, stride: int, generator: random.Random) -> list[int]:
    """Indices of a clip's frames in a video of `num_frames` > 0: `frames` of them, `stride` apart, from a uniform offset.

    A video too short for that begins at 0 and repeats.
    """
    span = (frames - 1) * stride + 1
    offset = int(generator.random() * (max(0, num_frames - span) + 1))
    return [(offset + number * stride) % num_frames for number in range(frames)]
