"""The model that labels: a teacher, or several whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from data.images.clean_view import EvalView
from pipeline.core.schema import LabelConfig
from pipeline.core.stage import StageError, digest_of
from pipeline.inference.predictor import Predictor, in_batches
from pipeline.inference.stage_weights import load_predictor, read_info, weights_folder
from pipeline.inputs.noised_view import noised
from pipeline.models.external_weights import weights_digest
from pipeline.upstream.stage_inputs import require_same_classes

_SHARED = ("num_classes", "image_size", "crop_pct", "interpolation", "resize", "clip")  # fields of WeightsInfo


class Ensemble:
    """Predictors with the same classes and the same view, used as one: the mean of their probabilities.

    Args:
        temperature: of that mean. The probabilities are softmax(log(mean) / temperature): pooled first, then calibrated (Rahaman and
            Thiery, arXiv 2007.08792). 1: the mean itself.
    """

    def __init__(self, members: Sequence[Predictor], temperature: float = 1.0) -> None:
        first = members[0]
        self.view, self.batch_size, self.device = first.view, first.batch_size, first.device
        self._members, self._temperature = members, temperature

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """(N, 3, S, S) uint8 → (N, C) float32."""
        return in_batches(self.device_probabilities, images, self)

    @torch.inference_mode()
    def device_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """As `probabilities`, for at most `batch_size` images on the device; the result stays there."""
        total, *others = (member.device_probabilities(images) for member in self._members)
        for other in others:
            total = total + other
        return tempered(total / len(self._members), self._temperature)


def tempered(probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(log(probabilities) / temperature), (N, C) float32; the same tensor for a temperature of 1."""
    return probabilities if temperature == 1 else F.softmax(log_probabilities(probabilities) / temperature, dim=1)


def log_probabilities(probabilities: torch.Tensor) -> torch.Tensor:
    """Logarithms, finite also where a probability is too small for float32."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def load_labeling_predictor(
    folders: Sequence[str], config: LabelConfig, device: str, temperature: float = 1.0
) -> Ensemble:
    """The teacher as it labels: one model or several, on one view or several.

    Args:
        folders: of stages or of weights; the teacher's first.
        temperature: of their mean; see `Ensemble`.

    Raises:
        UsageError: torch finds no GPU.
        ModelError: a folder without weights of this pipeline.
        StageError: members with different classes or different views.
    """
    _require_alike(folders)
    members = [
        load_predictor(
            folder, device, config.batch_size, config.num_views, config.decoder, fast=True, crops=config.crops
        )
        for folder in folders
    ]
    if config.augment is not None:
        for member in members:
            preprocessing = member.preprocessing
            assert isinstance(member.view, EvalView), "label.augment is refused for clips"
            member.view = noised(member.view, config.augment, preprocessing.interpolation, preprocessing.mean)
    return Ensemble(members, temperature)


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
