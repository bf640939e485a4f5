"""Sparse targets are, once dense, the bytes that dense arithmetic over whole shards makes."""

from __future__ import annotations

from dataclasses import astuple
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from data.labels.top_k import TopK, top_k_of
from pipeline.inputs import targets as module
from pipeline.inputs.targets import SparseTargets, pseudo_label_targets, smoothed_targets


def stored(num_images: int, num_classes: int, top_k: int, peak: float) -> TopK:
    """Labels of random images as label files have them; a low `peak` makes them sure."""
    random = np.random.default_rng([num_images, num_classes, top_k])
    full = random.dirichlet(np.full(num_classes, peak), num_images).astype(np.float32)
    top = top_k_of(full, top_k)
    return TopK(top.index.astype(np.int16), top.prob.astype(np.float16), top.rest)


def dense_arithmetic(top_k: TopK, num_classes: int, kind: str, temperature: float) -> torch.Tensor:
    """Targets of a whole shard at once, in the order of operations of the first release."""
    others = max(num_classes - top_k.index.shape[1], 1)
    rest = top_k.rest if num_classes > top_k.index.shape[1] else np.zeros(len(top_k.rest), np.float32)
    targets = np.repeat((rest / others)[:, None], num_classes, axis=1).astype(np.float32)
    np.put_along_axis(targets, top_k.index.astype(np.int64), top_k.prob.astype(np.float32), axis=1)
    probabilities = torch.from_numpy(targets / targets.sum(axis=1, keepdims=True))
    if kind == "hard":
        return functional.one_hot(probabilities.argmax(1), num_classes).float()
    return probabilities if temperature == 1 else (probabilities.log() / temperature).softmax(1)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([2, 3, 10, 17, 1000]), st.integers(1, 12), st.integers(1, 40), st.sampled_from([0.01, 0.3, 50]),
    st.sampled_from([("soft", 1.0), ("soft", 0.7), ("soft", 1.3), ("hard", 1.0)]),
)  # fmt: skip
def test_any_rows_have_the_targets_of_the_whole_shard_to_the_last_bit(
    num_classes: int, top_k: int, num_images: int, peak: float, rule: tuple[Literal["soft", "hard"], float]
) -> None:
    labels = stored(num_images, num_classes, min(top_k, num_classes), peak)
    expected = dense_arithmetic(labels, num_classes, *rule)
    rows = np.random.default_rng(0).permutation(num_images)[: 1 + num_images // 2]
    some = TopK(*(getattr(labels, name)[rows] for name in ("index", "prob", "rest")))
    assert torch.equal(pseudo_label_targets(some, num_classes, *rule).dense(), expected[torch.from_numpy(rows)])


def test_targets_do_not_depend_on_how_many_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = stored(40, 17, 3, 0.3)
    whole = pseudo_label_targets(labels, 17, "soft", 0.7).dense()
    monkeypatch.setattr(module, "_BLOCK", 40)  # two rows
    assert torch.equal(pseudo_label_targets(labels, 17, "soft", 0.7).dense(), whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothed_labels_equal_smoothed_one_hot_vectors_to_the_last_bit(smoothing: float) -> None:
    labels = torch.randint(0, 1000, (50,))
    expected = functional.one_hot(labels, 1000).float().mul_(1 - smoothing).add_(smoothing / 1000)
    assert torch.equal(smoothed_targets(labels.numpy(), 1000, smoothing).dense(), expected)


def test_labels_and_probabilities_join_to_one_batch() -> None:
    parts = [smoothed_targets(np.array([3, 1]), 10, 0.1), pseudo_label_targets(stored(5, 10, 4, 0.3), 10, "soft", 1.0)]
    joined = SparseTargets.concatenate(parts)
    assert joined.index.shape == (7, 4)
    assert torch.equal(joined.dense(), torch.cat([part.dense() for part in parts]))


def test_a_target_of_20_000_classes_takes_bytes_by_its_top_k() -> None:
    targets = pseudo_label_targets(stored(64, 20_000, 10, 0.01), 20_000, "soft", 1.0)
    assert sum(part.nbytes for part in astuple(targets) if isinstance(part, np.ndarray)) == 64 * (10 * 8 + 4)
