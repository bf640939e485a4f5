"""Predicting a split: batches are loaded ahead, few at a time, and ranks share them without changing a number."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from data.errors import DataError
from data.shards.split import Shard, Split
from pipeline.evaluation.stage import _measure
from pipeline.inference.accuracy import top_k_accuracy
from pipeline.inference.calibration import calibration_error, softmax
from pipeline.inference.predictor import Predictor, count_right, predict_batches, predict_sampled, predict_split
from pipeline.inference.preprocessing import Preprocessing
from pipeline.models.registry import build_model
from tests import HANGS_S

SIDE, BATCH = 16, 7  # four shards of 30, 30, 30 and 10 images: 5, 5, 5 and 2 batches
NUM_BATCHES, NUM_IMAGES = 17, 100
PREPROCESSING = Preprocessing(
    image_size=SIDE, crop_pct=1.0, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), precision="fp32"
)


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    model = build_model("resnetrs26", 10, {"width": 0.125, "blocks": [1, 1, 1, 1]})
    return Predictor(model, PREPROCESSING, "cpu", BATCH)


def means(images: torch.Tensor) -> np.ndarray:
    """The mean of each image: (N, 1) float32."""
    return images.float().mean(dim=(1, 2, 3)).numpy()[:, None]


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_ranks_predict_each_batch_once_to_the_same_bytes_as_one(
    labeled: Split, predictor: Predictor, world: int
) -> None:
    logits, labels = predict_split(labeled, predictor)
    shares = [
        list(predict_batches(labeled, predictor.view, BATCH, predictor.logits, rank=rank, world=world))
        for rank in range(world)
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    in_turn = [shares[number % world][number // world] for number in range(NUM_BATCHES)]
    assert sum(map(len, shares)) == NUM_BATCHES
    assert np.concatenate([part for part, _ in in_turn]).tobytes() == logits.tobytes()
    assert np.concatenate([part for _, part in in_turn]).tolist() == labels.tolist()
    counts = [count_right(labeled, predictor, 2, rank, world) for rank in range(world)]
    assert np.sum(counts, axis=0).tolist() == [int((logits.argmax(axis=1) == labels).sum()), NUM_IMAGES]


class Decoding:
    """A view that counts the images that were begun, and calls `before` with the count before it decodes."""

    def __init__(self, view: Callable[[bytes], np.ndarray], before: Callable[[int], object]) -> None:
        self.view, self.before = view, before
        self.changed, self.begun = threading.Condition(), 0

    def __call__(self, content: bytes) -> np.ndarray:
        with self.changed:
            self.begun += 1
            number = self.begun
            self.changed.notify_all()
        self.before(number)
        return self.view(content)

    def wait_for(self, images: int) -> bool:
        """Wait until so many were begun."""
        with self.changed:
            return self.changed.wait_for(lambda: self.begun >= images, HANGS_S)


def test_two_batches_are_decoded_while_one_is_predicted_and_no_more(labeled: Split, predictor: Predictor) -> None:
    view = Decoding(predictor.view, lambda number: None)
    numbers = iter(range(NUM_BATCHES))
    bounds = [0, *np.cumsum([7, 7, 7, 7, 2] * 3 + [7, 3]).tolist(), NUM_IMAGES, NUM_IMAGES]

    def predict(images: torch.Tensor) -> np.ndarray:
        number = next(numbers)
        assert view.wait_for(bounds[number + 3]), "decoding waits for the model"
        assert view.begun == bounds[number + 3], "more batches in memory than promised"
        return means(images)

    scores, expected = (
        np.concatenate([found for found, _ in predict_batches(labeled, a_view, BATCH, function)])  # type: ignore[arg-type]
        for a_view, function in ((view, predict), (predictor.view, means))
    )
    assert scores.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("held", "every"), [(1000, 1), (999, 2), (300, 4)])
def test_of_many_scores_those_of_every_nth_image_are_held(
    labeled: Split, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, held: int, every: int
) -> None:
    logits, labels = predict_split(labeled, predictor)
    monkeypatch.setattr("pipeline.inference.predictor.HELD_SCORES", held)
    found = predict_sampled(labeled, predictor.view, BATCH, predictor.logits)
    assert found.scores.tobytes() == logits[::every].tobytes()
    assert found.scores.size <= held
    assert found.scored_labels.tolist() == labels[::every].tolist()
    assert found.labels.tolist() == labels.tolist()
    assert found.predicted.tolist() == logits.argmax(axis=1).tolist()
    assert found.highest.tolist() == logits.max(axis=1).tolist()


def test_figures_made_batch_by_batch_are_those_of_all_scores(labeled: Split, predictor: Predictor) -> None:
    predictor.temperature = 0.7
    figures, columns = _measure(labeled, predictor, 10)
    logits, labels = predict_split(labeled, predictor)
    probabilities = softmax(logits, 0.7)
    assert [figures["top1"], figures["top5"]] == top_k_accuracy(logits, labels)
    right = probabilities.argmax(axis=1) == labels
    assert figures["calibration_error"] == calibration_error(probabilities.max(axis=1), right)
    assert figures["per_class_top1"] == [float(right[labels == label].mean()) for label in range(10)]
    assert columns["label"].tolist() == logits.argmax(axis=1).tolist()
    assert columns["confidence"].tobytes() == probabilities.max(axis=1).tobytes()


def test_an_evaluation_of_many_classes_holds_the_scores_of_a_batch_alone(labeled: Split) -> None:
    num_classes = 20_000
    model = build_model("resnetrs26", num_classes, {"width": 0.125, "blocks": [1, 1, 1, 1]})
    predictor = Predictor(model, PREPROCESSING, "cpu", BATCH)
    list(predict_batches(labeled, predictor.view, BATCH, means))  # what is made once
    tracemalloc.start()
    try:
        _measure(labeled, predictor, num_classes)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    of_batch = BATCH * num_classes * 4
    assert (
        peak < 7 * of_batch < NUM_IMAGES * num_classes * 4 / 2
    )  # a batch of logits, sorted; lists with an entry per class


def test_as_many_images_are_decoded_at_once_as_there_are_threads(labeled: Split, predictor: Predictor) -> None:
    together = threading.Barrier(5)
    view = Decoding(predictor.view, lambda number: number <= 5 and together.wait(HANGS_S))
    batches = predict_batches(labeled, view, BATCH, means, threads=5)  # type: ignore[arg-type]
    assert sum(len(labels) for _, labels in batches) == NUM_IMAGES


def test_the_first_image_that_cannot_be_decoded_is_named(labeled: Split, predictor: Predictor) -> None:
    """Not one of the batch behind it, though that may fail earlier."""
    path = Path(labeled.shards[1].url)
    content = bytearray(path.read_bytes())
    for row in (8, 16):
        offset = labeled.shards[1].index().column("offset")[row].as_py()
        content[offset : offset + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"labeled-000001\.tar, key '00038'.*repair or remove the image"):
        predict_split(labeled, predictor)


@pytest.mark.parametrize(("rank", "read"), [(0, [0]), (6, [1]), (11, [2]), (16, [3]), (17, [])])
def test_only_the_indexes_of_the_shards_that_have_the_ranks_batches_are_read(
    labeled: Split, predictor: Predictor, monkeypatch: pytest.MonkeyPatch, rank: int, read: list[int]
) -> None:
    """Of a store with thousands of shards, an evaluation reads a batch of every hundredth."""
    opened: list[str] = []
    original = Shard.index

    def index(shard: Shard) -> pa.Table:
        opened.append(shard.url)
        return original(shard)

    monkeypatch.setattr(Shard, "index", index)
    found = list(predict_batches(labeled, predictor.view, BATCH, means, rank=rank, world=NUM_BATCHES + 1))
    assert opened == [labeled.shards[position].url for position in read]
    assert len(found) == len(read)
