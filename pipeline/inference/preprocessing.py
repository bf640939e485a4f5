"""How an image becomes a model's input: recorded in weights, taken by `Predictor`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional as F

from data.clips.sampling import ClipSampling
from data.images.clean_view import Decoder, EvalView
from pipeline.core.schema import TrainConfig
from pipeline.models.weights import WeightsInfo

if TYPE_CHECKING:
    from data.clips.clean_view import ClipEvalView

_SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # (down, right) of views 0 and 1, 2 and 3, …; in steps
_STEP = 1 / 32  # of the side


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the model's input, without noise. The fields of `WeightsInfo` with these names record it.

    Attributes:
        image_size: side of the view, pixels.
        crop_pct: side of the centre crop as a fraction of the resized side; `resize="crop"` only.
        interpolation: of the resize.
        mean, std: per RGB channel, of pixels in 0 to 1.
        resize: `crop` resizes and crops; `pad` centres small images on black and never resizes.
        precision: of the forward pass; bf16 runs under autocast.
        clip: which frames of a video a model of clips sees; None: it sees images.
    """

    image_size: int
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["crop", "pad"] = "crop"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    clip: ClipSampling | None = None

    @classmethod
    def of_training(cls, section: TrainConfig) -> Preprocessing:
        """The preprocessing for a model trained with `section`: an image cropped in training is resized and cropped in inference."""
        return cls(
            image_size=section.image_size,
            crop_pct=section.crop_pct,
            interpolation=section.interpolation,
            mean=section.mean,
            std=section.std,
            resize="pad" if section.augment.crop == "pad_crop" else "crop",
            precision=section.precision,
            clip=ClipSampling(section.clip.frames, section.clip.stride) if section.clip else None,
        )

    @classmethod
    def of_weights(cls, info: WeightsInfo) -> Preprocessing:
        """The preprocessing that weights record."""
        return cls(**{field.name: getattr(info, field.name) for field in fields(cls)})

    def view(self, decoder: Decoder = "pillow", views: int = 1, crops: int = 1) -> EvalView | ClipEvalView:
        """The view of encoded images: bytes to uint8 (image_size, image_size, 3).

        Of encoded videos: to uint8 (views · frames, image_size, image_size, 3), of views / crops clips, `crops` crops of each.
        """
        frame = EvalView(self.image_size, self.crop_pct, self.interpolation, self.resize, decoder)
        if self.clip is None:
            return frame
        from data.clips.clean_view import ClipEvalView  # here: PyAV is an extra

        return ClipEvalView(frame, self.clip, views // crops, crops)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """Shape of the model's input of one sample: (3, S, S), of clips (frames, 3, S, S)."""
        frame = (3, self.image_size, self.image_size)
        return frame if self.clip is None else (self.clip.frames, *frame)

    def nth_view(self, batch: torch.Tensor, number: int) -> torch.Tensor:
        """View `number` of a float batch: of images a mirrored or shifted one, of videos the clips with this number."""
        if self.clip is None:
            return nth_image_view(batch, number)
        return batch[:, number * self.clip.frames : (number + 1) * self.clip.frames]

    def memory_format(self, channels_last: bool) -> torch.memory_format:
        """Of model and batches; clips have no channels_last."""
        return torch.channels_last if channels_last and self.clip is None else torch.contiguous_format


def nth_image_view(batch: torch.Tensor, number: int) -> torch.Tensor:
    """View `number` of a float batch (N, 3, S, S): odd views are mirrored; each pair has the next shift."""
    if number % 2:
        batch = batch.flip(3)
    down, right = _SHIFTS[number // 2]
    if not down and not right:
        return batch
    size = batch.shape[-1]
    step = max(1, round(size * _STEP))
    top, left = step * (1 + down), step * (1 + right)
    return F.pad(batch, (step,) * 4, mode="replicate")[:, :, top : top + size, left : left + size]
