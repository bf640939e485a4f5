"""Images with input noise for a model that labels: what Noisy Student does not do, so that its ablation can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.images.clean_view import EvalView
from data.images.decode import Pixels
from data.images.similarity import image_hash
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.train_transform import TrainTransform


@dataclass(frozen=True, kw_only=True)
class NoisedView(EvalView):
    """A view with noise that is a function of the image alone: the seed is its perceptual hash."""

    transform: TrainTransform

    def __call__(self, content: bytes) -> Pixels:
        """uint8 (image_size, image_size, 3) of one encoded image; raises DecodeError."""
        return self.with_hash(content)[0]

    def with_hash(self, content: bytes) -> tuple[Pixels, int]:
        """The noised view, and the hash of the image without noise; raises DecodeError."""
        image = self._decode(content)
        number = image_hash(image)
        return np.ascontiguousarray(self.transform(image, number).permute(1, 2, 0).numpy()), number


def noised(
    view: EvalView,
    augment: AugmentConfig,
    interpolation: Literal["bilinear", "bicubic"],
    mean: tuple[float, float, float],
) -> NoisedView:
    """The same view with noise; for `interpolation` and `mean` see `TrainTransform`."""
    transform = TrainTransform(augment, view.image_size, interpolation, mean)
    return NoisedView(view.image_size, view.crop_pct, view.interpolation, view.mode, view.decoder, transform=transform)
