"""The model that labels: a teacher, or several whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.core.schema import LabelConfig
from pipeline.core.stage import StageError, digest_of
from pipeline.inference.predictor import Predictor
from pipeline.inference.stage_weights import load_predictor, read_info, weights_folder
from pipeline.inputs.noised_view import noised
from pipeline.models.external_weights import weights_digest
from pipeline.upstream.stage_inputs import require_same_classes

_SHARED = ("num_classes", "image_size", "crop_pct", "interpolation", "resize")  # fields of WeightsInfo


class Ensemble:
    """Predictors with the same classes and the same view, used as one: the mean of their probabilities."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        first = members[0]
        self.view, self.batch_size, self.device = first.view, first.batch_size, first.device
        self._members = members

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, S, S) uint8 → (N, C) float32."""
        return np.stack([member.probabilities(images) for member in self._members]).mean(axis=0, dtype=np.float32)


def load_labeling_predictor(folders: Sequence[str], config: LabelConfig, device: str) -> Predictor | Ensemble:
    """The teacher as it labels: one model, or the mean of several.

    Args:
        folders: of stages or of weights; the teacher's first.

    Raises:
        UsageError: torch finds no GPU.
        ModelError: a folder without weights of this pipeline.
        StageError: members with different classes or different views.
    """
    _require_alike(folders)
    members = [
        load_predictor(folder, device, config.batch_size, config.views, config.decoder, fast=True) for folder in folders
    ]
    if config.augment is not None:
        for member in members:
            preprocessing = member.preprocessing
            member.view = noised(member.view, config.augment, preprocessing.interpolation, preprocessing.mean)
    return members[0] if len(members) == 1 else Ensemble(members)


def _require_alike(folders: Sequence[str]) -> None:
    """Raise StageError where a member has other classes or another view than the first."""
    teacher = read_info(folders[0])
    for folder in folders[1:]:
        info = read_info(folder)
        require_same_classes(teacher.class_names, "the teacher", info.class_names, f"teacher.ensemble: {folder}")
        for field in _SHARED:
            expected, found = getattr(teacher, field), getattr(info, field)
            if found != expected:
                raise StageError(
                    f"teacher.ensemble: {folder} has {field} {found!r}, the teacher {expected!r}; expected the same, as an "
                    "image is prepared once for all"
                )


def ensemble_digest(folders: Sequence[str]) -> str:
    """Identity of the weights in several folders. Raises ModelError where a folder has none."""
    return digest_of([weights_digest(weights_folder(folder)) for folder in folders])
