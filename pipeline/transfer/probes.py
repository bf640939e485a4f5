"""Classifiers on features that stay as they are: logistic regression and nearest neighbours. Validation images choose.

After the choice, both learn from labeled and validation images together, as published (SimCLR, arXiv 2002.05709, B.8.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from pipeline.transfer.features import Features

_MAX_ITERATIONS = 1000
_QUERIES = 256  # compared with all neighbours at a time


@dataclass(frozen=True, eq=False)
class Probe:
    """A classifier's choice and its predictions.

    Attributes:
        grid: every setting with its `validation_top1`, a fraction.
        chosen: the best of `grid`, the first one of equals.
        labels, predicted: of the test images, (N,) int64 each.
    """

    grid: tuple[dict[str, Any], ...]
    chosen: dict[str, Any]
    labels: np.ndarray
    predicted: np.ndarray


def best_of(grid: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The setting with the highest `validation_top1`, the first one of equals."""
    return max(grid, key=lambda setting: setting["validation_top1"])


def linear_probe(labeled: Features, validation: Features, test: Features, l2: Sequence[float], threads: int) -> Probe:
    """Multinomial logistic regression by L-BFGS, on features standardized by the training images' mean and deviation.

    The loss is mean cross-entropy + l2 / 2 · ‖w‖². Strong regularization is tried first and wins among equals; each fit starts from
    the one before. BLAS runs with `threads` threads: another number rounds differently.

    Args:
        l2: weights of the penalty to try.
    """
    with threadpool_limits(limits=threads):
        grid = _linear_grid(labeled, validation, sorted(l2, reverse=True))
        chosen = best_of(grid)
        everything = labeled + validation
        scaling = _scaling(everything.values)
        model = _regression(chosen["l2"], len(everything))
        _fit(model, _scaled(everything.values, scaling), everything.labels)
        predicted = model.predict(_scaled(test.values, scaling)).astype(np.int64)
        return Probe(tuple(grid), chosen, test.labels, predicted)


def _linear_grid(labeled: Features, validation: Features, l2: Sequence[float]) -> list[dict[str, Any]]:
    scaling = _scaling(labeled.values)
    values, held_out = _scaled(labeled.values, scaling), _scaled(validation.values, scaling)
    grid = []
    model = _regression(l2[0], len(labeled))
    for weight in l2:
        model.set_params(C=1 / (weight * len(labeled)))
        iterations = _fit(model, values, labeled.labels)
        top1 = float((model.predict(held_out) == validation.labels).mean())
        grid.append({"l2": weight, "iterations": iterations, "validation_top1": top1})
    return grid


def _regression(l2: float, num_images: int) -> LogisticRegression:
    """scikit-learn's model; its C weighs the summed loss against ½‖w‖², so 1 / (l2 · N)."""
    return LogisticRegression(C=1 / (l2 * num_images), max_iter=_MAX_ITERATIONS, warm_start=True)


def _fit(model: LogisticRegression, values: np.ndarray, labels: np.ndarray) -> int:
    """Fit; return the iterations of L-BFGS, which ends at `_MAX_ITERATIONS` at the latest."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # `iterations` in the result tells
        model.fit(values, labels)
    return int(model.n_iter_.max())


def _scaling(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature, float64 (F,); a constant feature has deviation 1."""
    deviation = values.std(axis=0, dtype=np.float64)
    return values.mean(axis=0, dtype=np.float64), np.where(deviation > 0, deviation, 1.0)


def _scaled(values: np.ndarray, scaling: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return (values - scaling[0]) / scaling[1]


def knn_probe(
    labeled: Features,
    validation: Features,
    test: Features,
    num_classes: int,
    grid: tuple[Sequence[int], Sequence[float]],
    threads: int,
) -> Probe:
    """Vote of the k nearest by cosine similarity s, weighted by exp(s / temperature) (Wu et al., arXiv 1805.01978, section 3.4).

    Args:
        grid: numbers of neighbours k (at most all images count), and temperatures.
    """
    with threadpool_limits(limits=threads):
        settings = [{"k": k, "temperature": temperature} for k, temperature in product(*grid)]
        votes = _votes(labeled, validation.values, num_classes, settings)
        tried = [
            setting | {"validation_top1": float((found == validation.labels).mean())}
            for setting, found in zip(settings, votes, strict=True)
        ]
        chosen = best_of(tried)
        predicted = _votes(labeled + validation, test.values, num_classes, [chosen])[0]
        return Probe(tuple(tried), chosen, test.labels, predicted)


def _votes(
    known: Features, queries: np.ndarray, num_classes: int, settings: Sequence[dict[str, Any]]
) -> list[np.ndarray]:
    """The predicted labels (N,) int64 for each of `settings`."""
    gallery = _unit(known.values)
    most = min(len(known), max(setting["k"] for setting in settings))
    blocks: list[list[np.ndarray]] = [[] for _ in settings]
    for start in range(0, len(queries), _QUERIES):
        similarity = _unit(queries[start : start + _QUERIES]) @ gallery.T
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
        close, labels = np.take_along_axis(similarity, nearest, axis=1), known.labels[nearest]
        for found, setting in zip(blocks, settings, strict=True):
            found.append(
                _vote(close[:, : setting["k"]], labels[:, : setting["k"]], setting["temperature"], num_classes)
            )
    return [np.concatenate(found) for found in blocks]


def _vote(similarity: np.ndarray, labels: np.ndarray, temperature: float, num_classes: int) -> np.ndarray:
    """The class with the largest sum of weights, the lowest one of equals: (n, k) twice → (n,) int64."""
    weights = np.exp((similarity - 1) / temperature, dtype=np.float64)  # the factor e^(−1/t) is all neighbours'
    rows = np.arange(len(labels))[:, None]
    sums = np.zeros((len(labels), num_classes))
    np.add.at(sums, (rows, labels), weights)
    return sums.argmax(axis=1)


def _unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; a row of zeros stays."""
    length = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    return values / np.where(length > 0, length, 1.0)
