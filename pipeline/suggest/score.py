"""Run the teacher on candidates: the probabilities of each view and of each member of an ensemble, and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from data.errors import DataError
from data.images.decode import DecodeError
from data.progress_bar import ProgressBar
from data.shards.image_reader import read_image
from pipeline.inference.predictor import Predictor
from pipeline.inference.preprocessing import Preprocessing
from pipeline.inference.stage_weights import load_predictor, read_info, weights_folder
from pipeline.models.weights import WeightsInfo
from pipeline.suggest.candidates import Candidate
from pipeline.transfer.backbones import Backbone


class Scores(NamedTuple):
    """Of the candidates that could be read.

    Attributes:
        rows: their positions among the candidates, (n,) int64.
        probabilities: (voters, n, C) float32.
        features: (n, F) float32, of the first teacher.
    """

    rows: np.ndarray
    probabilities: np.ndarray
    features: np.ndarray


def score(
    candidates: Sequence[Candidate],
    urls: Sequence[str],
    teachers: Sequence[str],
    views: int,
    device: str,
    threads: int,
    batch_size: int,
) -> Scores:
    """Score candidates; leave out those that cannot be read: their shards were moved or have changed.

    Args:
        urls: of each candidate's shard.
        teachers: folders of stages or of weights.
        views: of each teacher.

    Raises DataError when no candidate can be read.
    """
    torch.set_num_threads(threads)
    members = [load_predictor(folder, device, batch_size, views, "fast", fast=True) for folder in teachers]
    info = read_info(teachers[0])
    backbone = _feature_predictor(teachers[0], info, device, batch_size)
    rows: list[int] = []
    votes, features = list[np.ndarray](), list[np.ndarray]()
    with ProgressBar(total=len(candidates), desc="suggest", unit="image") as bar:
        for start in range(0, len(candidates), batch_size):
            positions = range(start, min(start + batch_size, len(candidates)))
            loaded = {
                at: image for at in positions if (image := _load(members[0], candidates[at], urls[at])) is not None
            }
            if loaded:
                images = torch.stack(list(loaded.values()))
                votes.append(np.concatenate([member.view_probabilities(images) for member in members]))
                features.append(backbone.logits(images))
                rows += loaded
            bar.update(len(positions))
    if not rows:
        raise DataError(
            "stage=suggest: none of the images can be read; are the shards of data.unlabeled where they were?"
        )
    return Scores(np.array(rows), np.concatenate(votes, axis=1), np.concatenate(features))


def _load(predictor: Predictor, candidate: Candidate, url: str) -> torch.Tensor | None:
    try:
        return torch.from_numpy(predictor.view(read_image(url, candidate.place))).movedim(-1, -3)
    except (OSError, DataError, DecodeError):
        return None


def _feature_predictor(folder: str, info: WeightsInfo, device: str, batch_size: int) -> Predictor:
    """The first teacher without its head."""
    prepared = Preprocessing.of_weights(info)
    network = Backbone("teacher", weights_folder(folder), "folder", info.model, info.model_args, prepared, 0).network()
    return Predictor(network, prepared, device, batch_size, decoder="fast")
