"""Predict in Python with finished weights: the pixels, classes and confidences of `python -m pipeline.predict`.

timm builds the model, so that this needs neither Ray nor the pipeline.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from data.errors import DataError
    from data.images.decode import DecodeError
    from data.labels.top_k import top_k_of
    from data.storage import read_bytes
else:
    from ._data.errors import DataError
    from ._data.images.decode import DecodeError
    from ._data.labels.top_k import top_k_of
    from ._data.storage import read_bytes

_OURS = "noisy_student"  # this project's key in a weights folder's config.json


class Prediction(NamedTuple):
    """What a model says of an image.

    Attributes:
        label: number of the most probable class.
        class_name: its name; None where the weights name no classes.
        confidence: its calibrated probability, 0 to 1.
        top_k: name (or number) and probability of the most probable classes, this one first.
    """

    label: int
    class_name: str | None
    confidence: float
    top_k: tuple[tuple[str | int, float], ...]


class Classifier:
    """A model for images in this process.

        classifier = Classifier("runs/mine/gen-1/student/weights")
        for found in classifier(["a.jpg", "b.png"]):
            print(found.class_name, found.confidence)

    Args:
        weights: folder of weights (`config.json`, `model.safetensors`).
        top_k: classes in a prediction.
        device: for torch, as `cuda`; by default a GPU if there is one.
        batch_size: images in a forward pass.
        decoder: `fast`, or `pillow` for exactly timm's pixels; see `python -m pipeline.predict`.

    Raises:
        DataError: `weights` is no folder of weights.
        ModuleNotFoundError: torch or timm is not installed.
        ValueError: another argument is not as above.
    """

    def __init__(
        self, weights: str, *, top_k: int = 5, device: str | None = None, batch_size: int = 64, decoder: str = "fast"
    ) -> None:
        if decoder not in ("fast", "pillow"):
            raise ValueError(f"decoder={decoder!r}: expected 'fast' or 'pillow'")
        if top_k < 1 or batch_size < 1:
            raise ValueError(f"top_k={top_k} and batch_size={batch_size}: expected 1 or more")
        torch, timm, view = _imports()
        known = _read_config(weights)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = timm.create_model(f"local-dir:{weights}", pretrained=True).to(self.device).eval()
        self.class_names: list[str] | None = known["class_names"]
        self.view = view(known["image_size"], known["crop_pct"], known["interpolation"], known["resize"], decoder)
        self._mean, self._std = (
            torch.tensor(known[name], device=self.device).view(-1, 1, 1) for name in ("mean", "std")
        )
        self._temperature, self._is_bf16 = known["temperature"], known["precision"] == "bf16"
        self._top_k, self._batch_size = min(top_k, known["num_classes"]), batch_size

    def __call__(self, images: Iterable[str | os.PathLike[str] | bytes | Image.Image]) -> list[Prediction]:
        """Predict images: paths, URLs, encoded bytes, or RGB images as `load_image` gives them.

        Raises:
            DataError: an image cannot be decoded, or is not RGB; names it.
            FileNotFoundError, StorageError: an image cannot be read.
            TypeError: `images` is one image, not several.
        """
        if isinstance(images, str | os.PathLike | bytes | Image.Image):  # a text would be read letter by letter
            raise TypeError(f"expected a list of images, as classifier([image]); got one {type(images).__name__}")
        found: list[Prediction] = []
        views: list[np.ndarray] = []
        for image in images:
            views.append(self._view_of(image))
            if len(views) == self._batch_size:
                found += self._predict(np.stack(views))
                views = []
        return found + self._predict(np.stack(views)) if views else found

    def _view_of(self, image: str | os.PathLike[str] | bytes | Image.Image) -> np.ndarray:
        """What the model sees of an image: uint8 (image_size, image_size, 3)."""
        if isinstance(image, Image.Image):
            if image.mode != "RGB":
                raise DataError(
                    f"an image of mode {image.mode}: expected RGB; noisy_student.load_image gives the right pixels"
                )
            return np.asarray(self.view.fit(np.array(image)))
        name, content = (
            ("an image", image) if isinstance(image, bytes) else (os.fspath(image), read_bytes(os.fspath(image)))
        )
        try:
            return np.asarray(self.view(content))
        except DecodeError as error:
            raise DataError(f"{name} cannot be decoded ({error})") from error

    def _predict(self, views: np.ndarray) -> list[Prediction]:
        """Predict one batch, uint8 (n, image_size, image_size, 3)."""
        import torch

        kind = self.device.partition(":")[0]
        pixels = torch.from_numpy(views).to(self.device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16) if self._is_bf16 else nullcontext():
            logits = self.model((pixels - self._mean) / self._std).float()
        top = top_k_of(torch.softmax(logits / self._temperature, dim=1).cpu().numpy(), self._top_k)
        return [
            self._as_prediction(index, prob) for index, prob in zip(top.index.tolist(), top.prob.tolist(), strict=True)
        ]

    def _as_prediction(self, index: list[int], prob: list[float]) -> Prediction:
        names = self.class_names
        classes = [names[label] if names else label for label in index]
        return Prediction(index[0], names[index[0]] if names else None, prob[0], tuple(zip(classes, prob, strict=True)))


def _imports() -> tuple[Any, Any, Any]:
    """torch, timm, and the view of images, which needs torch."""
    try:
        import timm
        import torch

        from ._data.images.clean_view import EvalView
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "timm"):
            raise
        message = "Classifier needs torch and timm: pip install torch timm, or 'noisy-student-pipeline[train]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    return torch, timm, EvalView


def _read_config(weights: str) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(weights) / "config.json").read_text())[_OURS])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{weights}: not a folder of weights ({type(error).__name__}: {error}); expected RUN/gen-N/student/weights"
        ) from error
