"""Predict without noise: eval mode, the model's own resolution. Validation, labeling and evaluation all use this."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from data.errors import DataError
from data.images.clean_view import Decoder, EvalView
from data.images.decode import DecodeError
from data.shards.image_reader import ImageReader, Place, places_in
from data.shards.split import Split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inputs.train_transform import normalization

if TYPE_CHECKING:
    from data.clips.clean_view import ClipEvalView

_AHEAD = 2  # batches that are read and decoded while one is predicted
_NOTHING: Mapping[str, Sequence[int]] = MappingProxyType({})


class Predictor:
    """Turns images into logits or probabilities.

    Args:
        model: put into eval mode; its weights are used as they are (pass the EMA's).
        preprocessing: what the model was trained for.
        device: `cpu` or `cuda`.
        batch_size: images in every forward pass. The last batch is padded to it, so that an image's numbers do not depend on how
            many others came with it.
        temperature: divides the logits (1: uncalibrated).
        views: average the probabilities over the first `views` of ten views: the image and its mirror image, then both shifted by
            1/32 of the side to the right, left, bottom and top. Of videos: over so many clips and crops.
        crops: of each clip, if the model sees clips.
        decoder: of encoded images; see `EvalView`.
        channels_last: memory format of model and batches; changes logits by rounding only.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        device: str,
        batch_size: int = 256,
        temperature: float = 1.0,
        views: int = 1,
        decoder: Decoder = "pillow",
        channels_last: bool = False,
        crops: int = 1,
    ) -> None:
        self._memory_format = preprocessing.memory_format(channels_last)
        self.model = model.to(device, memory_format=self._memory_format).eval()  # type: ignore[call-overload]
        self.preprocessing, self.device, self.batch_size = preprocessing, device, batch_size
        self.temperature, self.views = temperature, views
        self._scale, self._offset = normalization(preprocessing.mean, preprocessing.std, device)
        self.view: EvalView | ClipEvalView = preprocessing.view(decoder, views, crops)

    def logits(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, S, S) uint8 → (N, C) float32 of the first view, not divided by the temperature."""
        return in_batches(lambda part: self._forward(self._prepared(part), 0)[: len(part)], images, self)

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, S, S) uint8 → (N, C) float32: softmax of logits / temperature, averaged over the views."""
        return in_batches(self.device_probabilities, images, self)

    @torch.inference_mode()
    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """As `probabilities`, for at most `batch_size` images on the device; the result stays there."""
        return self._of_views(images).mean(dim=0)

    def view_probabilities(self, images: torch.Tensor) -> np.ndarray:
        """At most `batch_size` images (N, 3, S, S) uint8 → (views, N, C) float32: softmax of logits / temperature of each view."""
        return self._of_views(images.to(self.device)).cpu().numpy()

    @torch.inference_mode()
    def _of_views(self, images: torch.Tensor) -> torch.Tensor:
        batch = self._prepared(images)
        outputs = (self._forward(batch, view)[: len(images)] for view in range(self.views))
        return torch.stack([F.softmax(output / self.temperature, dim=1) for output in outputs])

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        """The images, normalized and padded to `batch_size`: float32 (batch_size, 3, S, S)."""
        missing = self.batch_size - len(images)
        padded = F.pad(images, (*[0, 0] * (images.dim() - 1), 0, missing)) if missing > 0 else images
        return padded.float().mul_(self._scale).sub_(self._offset)

    @torch.inference_mode()
    def _forward(self, batch: torch.Tensor, view: int) -> torch.Tensor:
        """Logits of one view: float32 (batch_size, C)."""
        images = self.preprocessing.nth_view(batch, view).contiguous(memory_format=self._memory_format)
        is_bf16 = self.preprocessing.precision == "bf16"
        with torch.autocast(self.device, torch.bfloat16) if is_bf16 else nullcontext():
            output: torch.Tensor = self.model(images)
        return output.float()


class _Batched(Protocol):
    """Where a model's batches are computed."""

    device: str
    batch_size: int


def in_batches(predict: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, model: _Batched) -> np.ndarray:
    """Predictions (N, C) of any number of images, by a function of at most `batch_size` images on the model's device."""
    parts = images.split(model.batch_size)
    return np.concatenate([predict(part.to(model.device)).cpu().numpy() for part in parts])


def predict_split(split: Split, predictor: Predictor) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C) float32 and labels (N,) int64 of a labeled split, in shard order. Raises DataError as `predict_batches`."""
    batches = predict_batches(split, predictor.view, predictor.batch_size, predictor.logits)
    logits, labels = zip(*batches, strict=True)
    return np.concatenate(logits), np.concatenate(labels)


HELD_SCORES = 1 << 27  # of a split, at most


class Predicted(NamedTuple):
    """What a model makes of a labeled split, without the scores of all images where these are many.

    Attributes:
        labels, predicted: (N,) int64, in shard order.
        highest: score of each image, float32 (N,).
        scores: float32 (n, C) of every `every`-th image, from the first on: of all as long as N × C ≤ HELD_SCORES (512 MB).
    """

    labels: np.ndarray
    predicted: np.ndarray
    highest: np.ndarray
    scores: np.ndarray
    every: int

    @property
    def scored_labels(self) -> np.ndarray:
        """Labels of the images of `scores`, (n,) int64."""
        return self.labels[:: self.every]


def predict_sampled(
    split: Split, view: EvalView | ClipEvalView, batch_size: int, predict: Callable[[torch.Tensor], np.ndarray]
) -> Predicted:
    """Predict a labeled split. Raises DataError as `predict_batches`."""
    parts: list[tuple[np.ndarray, ...]] = []
    every, done = 1, 0
    for scores, labels in predict_batches(split, view, batch_size, predict):
        every = math.ceil(split.num_samples * scores.shape[1] / HELD_SCORES)
        held = scores[-done % every :: every].copy()  # a view would hold them all
        parts.append((labels, scores.argmax(axis=1), scores.max(axis=1), held))
        done += len(labels)
    answers, predicted, highest, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Predicted(answers, predicted, highest, scores, every)


def count_right(split: Split, predictor: Predictor, threads: int, rank: int, world: int) -> tuple[int, int]:
    """(right predictions, images) of a rank's share of a labeled split. Arguments and errors as of `predict_batches`."""
    batches = predict_batches(split, predictor.view, predictor.batch_size, predictor.logits, threads, rank, world)
    counts = [((logits.argmax(axis=1) == labels).sum(), len(labels)) for logits, labels in batches]
    return sum(int(right) for right, _ in counts), sum(images for _, images in counts)


def predict_batches(
    split: Split,
    view: EvalView | ClipEvalView,
    batch_size: int,
    predict: Callable[[torch.Tensor], np.ndarray],
    threads: int = 2,
    rank: int = 0,
    world: int = 1,
    left_out: Mapping[str, Sequence[int]] = _NOTHING,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions (n, C) float32 and labels (n,) int64 of the batches of a labeled split, in shard order, n ≤ `batch_size`.

    The next two batches are read and decoded while one is predicted; so three are in memory. A batch never spans two shards.

    Args:
        predict: (n, 3, S, S) uint8 → (n, C) float32.
        threads: that decode.
        rank, world: only every `world`-th batch, from batch `rank` on. Whole batches, so that an image's numbers do not depend on
            `world`.
        left_out: URL of a shard → rows of its index that are not read.

    Raises:
        DataError: an image cannot be decoded, or a shard has changed; names shard and key.
    """

    def prepare(item: tuple[str, bytes]) -> torch.Tensor:
        try:
            return torch.from_numpy(view(item[1])).movedim(-1, -3)
        except DecodeError as error:
            raise DataError(f"{item[0]}: {error}; repair or remove the image") from error

    def load(batch: _Batch) -> torch.Tensor:
        names = [f"{split.shards[batch.shard].url}, key {place.key!r}" for place in batch.places]
        items = zip(names, reader.images(batch.shard, batch.places), strict=True)
        return torch.stack(list(decoders.map(prepare, items)))

    reader = ImageReader([shard.url for shard in split.shards])
    decoders, loaders = ThreadPoolExecutor(threads), ThreadPoolExecutor(_AHEAD)
    with reader, decoders, loaders:  # ended from the last to the first
        loading: deque[tuple[Future[torch.Tensor], np.ndarray]] = deque()
        for batch in chain(_batches(split, batch_size, left_out, rank, world), repeat(None, _AHEAD)):
            if batch is not None:
                loading.append((loaders.submit(load, batch), batch.labels))
            if len(loading) > _AHEAD or (batch is None and loading):
                images, labels = loading.popleft()
                yield predict(images.result()), labels


class _Batch(NamedTuple):
    """Images of one shard, by its position in the split, and their labels, int64 (n,)."""

    shard: int
    places: list[Place]
    labels: np.ndarray


def _batches(
    split: Split, batch_size: int, left_out: Mapping[str, Sequence[int]], rank: int, world: int
) -> Iterator[_Batch]:
    """Every `world`-th batch, from batch `rank` on. Reads the indexes of the shards that these are of, and no others."""
    before = 0  # batches
    for position, shard in enumerate(split.shards):
        rows = np.delete(np.arange(shard.num_samples), list(left_out.get(shard.url, ())))
        starts = range(0, len(rows), batch_size)
        if own := starts[(rank - before) % world :: world]:
            index = shard.index()
            places, labels = places_in(index), index.column("label").to_numpy().astype(np.int64)
            for start in own:
                part = rows[start : start + batch_size]
                yield _Batch(position, [places[row] for row in part], labels[part])
        before += len(starts)
