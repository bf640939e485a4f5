"""Classes of nearest neighbours."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.inference import nearest_neighbors
from pipeline.inference.nearest_neighbors import leave_one_out_right


def clouds(images: int, classes: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around a centre for each class."""
    random = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = random.normal(size=(classes, 16))
    return (centres[labels] + noise * random.normal(size=(images, 16))).astype(np.float32), labels


def reference(features: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Leave-one-out, image by image, in float64."""
    rows = features / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    right = 0
    for i, row in enumerate(rows):
        cosines = rows @ row
        cosines[i] = -np.inf
        nearest = np.argsort(-cosines)[:k]
        votes = np.zeros(labels.max() + 1)
        np.add.at(votes, labels[nearest], np.exp(cosines[nearest] / 0.1))
        right += int(votes.argmax() == labels[i])
    return right / len(labels)


@pytest.mark.parametrize("noise", [0.1, 1.5])
def test_accuracy_is_that_of_a_search_image_by_image(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_neighbors, "_BLOCK", 700)  # several blocks of rows
    features, labels = clouds(90, 5, noise)
    right = leave_one_out_right(features, labels)
    assert sum(leave_one_out_right(features, labels, rank, 3) for rank in range(3)) == right
    assert leave_one_out_right(features, labels, 1, 3) < right / 2, "a share, not all"
    found = right / len(labels)
    assert found == pytest.approx(reference(features, labels, 20))
    assert (found == 1) == (noise < 1)


def test_no_image_votes_for_itself() -> None:
    features = np.eye(4, dtype=np.float32)
    assert leave_one_out_right(features, np.arange(4)) == 0
