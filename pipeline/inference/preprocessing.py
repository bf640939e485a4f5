"""How an image becomes a model's input: recorded in weights, taken by `Predictor`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from data.images.clean_view import Decoder, EvalView
from pipeline.core.schema import TrainConfig
from pipeline.models.weights import WeightsInfo


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
    """

    image_size: int
    crop_pct: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Literal["crop", "pad"] = "crop"
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"

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
        )

    @classmethod
    def of_weights(cls, info: WeightsInfo) -> Preprocessing:
        """The preprocessing that weights record."""
        return cls(**{field.name: getattr(info, field.name) for field in fields(cls)})

    def view(self, decoder: Decoder = "pillow") -> EvalView:
        """The view of encoded images: bytes to uint8 (image_size, image_size, 3)."""
        return EvalView(self.image_size, self.crop_pct, self.interpolation, self.resize, decoder)
