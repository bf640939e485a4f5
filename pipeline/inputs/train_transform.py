"""Training views of an image: crop, flip and input noise, a function of the pixels and a seed alone.

Order: geometry (one resampling), flip, RandAugment, brightness and contrast, distortion, cut-out. All after the flip is the `Noise`,
which can be added later, on another device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from data.clips.sampling import ClipSampling
from data.images.clean_view import Decoder
from data.images.decode import Pixels, decode_fast, jpeg_shape
from data.images.resize import window
from pipeline.core.schema import AugmentConfig, TrainConfig, ViewsConfig
from pipeline.inputs.crop import Box, affine_matrix, crop_box, resize, scale_box, shift
from pipeline.inputs.noise import Noise, add_noise, draw_noise

if TYPE_CHECKING:
    from pipeline.inputs.clip_transform import ClipTransform

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class TrainTransform:
    """Makes noised training views from images or encoded files, and seeds.

    `random_resized_crop` is Inception's crop, for photos. `pad_crop` is for small images, and never resizes: it centres the
    image in the view, then shifts it by up to ± `pad` px (4 at 32 px is CIFAR's usual crop). Outside the image is black; in
    RandAugment, grey.

    Attributes:
        interpolation: of random_resized_crop; the affine map and RandAugment are bilinear.
        mean: of the pixels, in 0 to 1: the colour of cut-outs, since the model sees it as 0.
        decoder: with `fast`, `from_file` scales a large JPEG while decoding, see `decode_fast`.
    """

    augment: AugmentConfig
    image_size: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    decoder: Decoder = "pillow"

    def __call__(self, image: Pixels, seed: int) -> torch.Tensor:
        """The noised view of an image: uint8 (H, W, 3) to uint8 (3, image_size, image_size), contiguous.

        The image must be writable (as `decode` makes it) or torch warns; it is not written to.
        """
        generator = random.Random(seed)
        return self.add_noise(*self._view(image, self._box(image.shape, generator), generator))

    def from_file(self, content: bytes, seed: int) -> tuple[torch.Tensor, Noise]:
        """Crop and flip an encoded image: uint8 (3, image_size, image_size), and the noise still to be added.

        Raises:
            DecodeError: see `data.images.decode.decode`.
        """
        return self.views(content, [seed])[0]

    def views(self, content: bytes, seeds: Sequence[int]) -> list[tuple[torch.Tensor, Noise]]:
        """`from_file` for each seed, decoding the image once; with the fast decoder at the scale that the smallest crop needs."""
        generators = [random.Random(seed) for seed in seeds]
        shape = jpeg_shape(content) if self.decoder == "fast" else None
        if shape is None or self.augment.crop != "random_resized_crop":
            image = decode_fast(content)
            boxes = [self._box(image.shape, generator) for generator in generators]
        else:
            boxes = [self._box(shape, generator) for generator in generators]
            image = decode_fast(content, max(math.ceil(self.image_size * min(shape) / min(_shape(b))) for b in boxes))
            boxes = [scale_box(box, shape, image.shape) for box in boxes]
        drawn = enumerate(zip(boxes, generators, strict=True))
        return [self._view(image, box, generator, number) for number, (box, generator) in drawn]

    def add_noise(self, view: torch.Tensor, noise: Noise) -> torch.Tensor:
        """Add the noise to one view, in place where possible."""
        return add_noise(view[None], [noise], self.augment, self.mean)[0]

    def _box(self, shape: tuple[int, ...], generator: random.Random) -> Box:
        """The part of an image of this shape to be resized; in `pad_crop`, all of it."""
        height, width = shape[:2]
        if self.augment.crop == "pad_crop":
            return slice(0, height), slice(0, width)
        return crop_box(height, width, self.augment.crop_scale, self.augment.crop_ratio, generator)

    def _view(self, image: Pixels, box: Box, generator: random.Random, number: int = 0) -> tuple[torch.Tensor, Noise]:
        view = self._geometry(image[box], generator)
        if generator.random() < self.augment.hflip:
            view = view[:, ::-1]
        planes = torch.from_numpy(np.array(view.transpose(2, 0, 1), order="C"))
        is_grey = isinstance(self.augment, ViewsConfig) and _is_grey(planes)
        return planes, draw_noise(self.augment, self.image_size, generator, number, is_grey)

    def _geometry(self, image: Pixels, generator: random.Random) -> Pixels:
        config, size = self.augment, self.image_size
        top = left = 0
        if config.crop == "random_resized_crop":
            image = resize(image, size, self.interpolation)
        else:
            top = (image.shape[0] - size) // 2 + shift(generator, config.pad)
            left = (image.shape[1] - size) // 2 + shift(generator, config.pad)
        if config.rotation or config.zoom or config.translate or config.shear:
            matrix = affine_matrix(config, top, left, size, generator)
            bilinear = Image.Resampling.BILINEAR
            return np.array(Image.fromarray(image).transform((size, size), Image.Transform.AFFINE, matrix, bilinear))
        return window(image, top, left, size) if config.crop == "pad_crop" else image


def make_transform(config: TrainConfig) -> TrainTransform:
    """The training transform of images of a configuration."""
    return TrainTransform(config.augment, config.image_size, config.interpolation, config.mean, config.decoder)


def make_views(config: TrainConfig) -> TrainTransform | ClipTransform:
    """What makes the training views of a configuration: of images, or of clips."""
    if config.clip is not None:
        from pipeline.inputs.clip_transform import ClipTransform  # here: PyAV is an extra

        sampling = ClipSampling(config.clip.frames, config.clip.stride)
        return ClipTransform(config.augment, config.image_size, config.interpolation, sampling)
    return make_transform(config)


def _is_grey(planes: torch.Tensor) -> bool:
    """Whether the three planes of an image are equal."""
    return torch.equal(planes[0], planes[1]) and torch.equal(planes[1], planes[2])


def _shape(box: Box) -> tuple[int, int]:
    return box[0].stop - box[0].start, box[1].stop - box[1].start


def view_seeds(views: int, *parts: int) -> list[int]:
    """The seeds of an image's views; of the first, that of a sample with one view."""
    return [sample_seed(*parts, *([view] if view else [])) for view in range(views)]


def sample_seed(*parts: int) -> int:
    """The seed of one view: 64 bits from (seed, stream, epoch, shard, row, copy), and the number of the view from the second on.

    It is independent of workers, ranks, batches, and the order in which views are made. Each part passes
    through SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@lru_cache(maxsize=64)
def normalization(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`scale` and `offset`, float32 (C, 1, 1), of pixels × scale − offset = (pixels / 255 − mean) / std; copied to a device once."""
    with torch.inference_mode(False):  # for training, too, whoever asks first
        scale = torch.tensor([1 / (255 * value) for value in std], device=device).view(-1, 1, 1)
        offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device).view(-1, 1, 1)
    return scale, offset


def normalize(batch: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(batch / 255 − mean) / std per channel, on the batch's device.

    Args:
        batch: uint8 (N, C, H, W).

    Returns:
        float32 (N, C, H, W), in the batch's memory format.
    """
    scale, offset = normalization(tuple(mean), tuple(std), batch.device)
    return batch.float().mul_(scale).sub_(offset)
