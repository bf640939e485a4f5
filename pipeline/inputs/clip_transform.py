"""Training views of a video: a clip at a random offset; one crop, one flip and one draw of RandAugment for all its frames.

The recipe of 3D ResNet-RS (arXiv 2109.01696). A view is a function of the file and a seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data.clips.decode import Wanted, decode_frames
from data.clips.sampling import ClipSampling
from data.images.decode import Pixels
from data.images.resize import window
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.crop import crop_box, resize, shift
from pipeline.inputs.noise import Noise
from pipeline.inputs.rand_augment import draw_operations, rand_augment

_ADDED = Noise((), (1.0, 1.0), (0, 0))  # the views have all their noise


@dataclass(frozen=True)
class ClipTransform:
    """Makes noised training views of videos; the counterpart of `TrainTransform`.

    Attributes:
        augment: crop, flip and RandAugment; the other fields are for images.
        image_size: side of the frames, pixels.
        interpolation: of random_resized_crop.
    """

    augment: AugmentConfig
    image_size: int
    interpolation: Literal["bilinear", "bicubic"]
    sampling: ClipSampling

    def views(self, content: bytes, seeds: Sequence[int]) -> list[tuple[torch.Tensor, Noise]]:
        """The view of an encoded video for each seed, uint8 (frames, 3, image_size, image_size), and no further noise.

        Raises:
            DecodeError: see `data.clips.decode.decode_frames`.
        """
        return [(self.view(content, random.Random(seed)), _ADDED) for seed in seeds]

    def view(self, content: bytes, generator: random.Random) -> torch.Tensor:
        """One view: uint8 (frames, 3, image_size, image_size), contiguous. Raises DecodeError."""
        cut: list[Callable[[Pixels], Pixels]] = []

        def resized(frame: Pixels) -> Pixels:
            if not cut:
                cut.append(self._cut(frame.shape[0], frame.shape[1], generator))
            return cut[0](frame)

        wanted = Wanted(lambda number: self.sampling.draw(number, generator), resized)
        return self._noised(decode_frames(content, wanted)[0], generator)

    def add_noise(self, view: torch.Tensor, noise: Noise) -> torch.Tensor:  # noqa: ARG002 (as `TrainTransform`'s)
        """The view as it is."""
        return view

    def _cut(self, height: int, width: int, generator: random.Random) -> Callable[[Pixels], Pixels]:
        """Draw the crop of all frames of this size."""
        size, augment = self.image_size, self.augment
        if augment.crop == "pad_crop":
            top = (height - size) // 2 + shift(generator, augment.pad)
            left = (width - size) // 2 + shift(generator, augment.pad)
            return lambda frame: window(frame, top, left, size)
        box = crop_box(height, width, augment.crop_scale, augment.crop_ratio, generator)
        return lambda frame: resize(frame[box], size, self.interpolation)

    def _noised(self, frames: Pixels, generator: random.Random) -> torch.Tensor:
        """Flip and RandAugment, drawn once for all frames."""
        if generator.random() < self.augment.hflip:
            frames = frames[:, :, ::-1]
        view = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
        if not self.augment.num_ops:
            return view
        operations = draw_operations(self.augment.num_ops, generator)
        return rand_augment(view, [operations] * len(view), self.augment.magnitude).contiguous()
