"""Clean inference: eval mode, no noise, the model's own resolution; for validation, labeling and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data.images.clean_view import Decoder, EvalView
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import DataError, Split
from pipeline.core.schema import TrainConfig
from pipeline.inputs.train_transform import normalize

_SHIFT = 1 / 32  # of the side: how far a shifted view moves


def view_of(config: TrainConfig, decoder: Decoder) -> EvalView:
    """The view that a model trained with `config` is given without noise."""
    mode: Literal["crop", "pad"] = "pad" if config.augment.crop == "pad_crop" else "crop"
    return EvalView(config.image_size, config.crop_pct, config.interpolation, mode, decoder)


class Predictor:
    """A model that turns images into probabilities.

    Args:
        model: put into eval mode; its weights are used as they are (give it the EMA's).
        config: the preprocessing the model was trained for.
        batch_size: every forward pass has exactly this many images, the last one padded, so that an image's numbers do not
            depend on how many others came with it.
        temperature: divides the logits (1: uncalibrated).
        decoder: of the images' bytes; see EvalView.
        views: averages over the image, its mirror image, and both shifted by 1/32 of the side in four directions, the first
            `views` of these ten.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: str,
        batch_size: int = 256,
        temperature: float = 1.0,
        views: int = 1,
        decoder: Decoder = "pillow",
    ) -> None:
        memory = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=memory).eval()  # type: ignore[call-overload]
        self.config, self.device, self.batch_size = config, device, batch_size
        self.temperature, self.views = temperature, views
        self._memory = memory
        self.view = view_of(config, decoder)

    def logits(self, images: torch.Tensor) -> np.ndarray:
        """(N, C) float32 of (N, 3, S, S) uint8, from the unmodified view, without temperature."""
        return np.concatenate([self._forward(part, 0).numpy() for part in images.split(self.batch_size)])

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """(N, C) float32 of (N, 3, S, S) uint8: softmax of logits / temperature, averaged over the views."""
        parts = []
        for part in images.split(self.batch_size):
            views = [F.softmax(self._forward(part, view) / self.temperature, dim=1) for view in range(self.views)]
            parts.append(torch.stack(views).mean(dim=0).numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor, view: int) -> torch.Tensor:
        count = len(images)
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size - count)) if count < self.batch_size else images
        batch = normalize(padded.to(self.device), self.config.mean, self.config.std)
        batch = _view(batch, view).contiguous(memory_format=self._memory)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output: torch.Tensor = self.model(batch)
        return output.float().cpu()[:count]


class Ensemble:
    """Several predictors of the same classes, which see the same view of an image, as one: the mean of their probabilities."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        first = members[0]
        self.view, self.batch_size, self.device = first.view, first.batch_size, first.device
        self._members = members

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """(N, C) float32 of (N, 3, S, S) uint8."""
        return np.stack([member.probabilities(images) for member in self._members]).mean(axis=0, dtype=np.float32)


def _view(batch: torch.Tensor, number: int) -> torch.Tensor:
    """View `number` of a float batch: odd ones are mirrored; every two, the next shift."""
    if number % 2:
        batch = batch.flip(3)
    step = max(1, round(batch.shape[-1] * _SHIFT))
    dy, dx = [(0, 0), (0, step), (0, -step), (step, 0), (-step, 0)][number // 2]
    if dy or dx:
        size = batch.shape[-1]
        batch = F.pad(batch, (step,) * 4, mode="replicate")[
            :, :, step + dy : step + dy + size, step + dx : step + dx + size
        ]
    return batch


def predict_split(split: Split, predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) float32 and labels (N,) int64 of a labeled split, in shard order. Raises as `predict_all`."""
    return predict_all(split, predictor.view, predictor.batch_size, predictor.logits)


def predict_all(
    split: Split, view: EvalView, batch_size: int, predict: Callable[[torch.Tensor], np.ndarray], threads: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (N, C) float32 and labels (N,) int64 of a labeled split, in shard order; one batch in memory at a time.

    Args:
        predict: (N, 3, S, S) uint8 to (N, C) float32.

    Raises:
        DataError: an image that cannot be decoded, or a shard that has changed, naming shard and key.
    """
    scores: list[np.ndarray] = []
    labels: list[np.ndarray] = []

    def prepare(item: tuple[str, bytes]) -> torch.Tensor:
        try:
            return torch.from_numpy(view(item[1])).permute(2, 0, 1)
        except DecodeError as error:
            raise DataError(f"{item[0]}: {error}; repair or remove the image") from error

    with ThreadPoolExecutor(threads) as pool, ImageReader([shard.url for shard in split.shards]) as reader:
        for position, shard in enumerate(split.shards):
            index = shard.index()
            labels.append(index.column("label").to_numpy())
            places = places_in(index)
            for start in range(0, len(places), batch_size):
                items = [
                    (f"{shard.url}, key {place.key!r}", reader.image(position, place))
                    for place in places[start : start + batch_size]
                ]
                scores.append(predict(torch.stack(list(pool.map(prepare, items)))))
    return np.concatenate(scores), np.concatenate(labels).astype(np.int64)


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> list[float]:
    """Fraction of rows whose label is among the k highest scores, for each k."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return [float((order[:, :k] == labels[:, None]).any(axis=1).mean()) for k in ks]
