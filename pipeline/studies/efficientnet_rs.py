"""EfficientNet-RS's study (arXiv 2103.07579, figure 5) for `stage=ablate`: a B-k at smaller images, beside the next smaller B-k.

The paper's claim is one of equal latency: a larger network at fewer pixels beats a smaller one at its own. Its image sizes are not
published, so the rows are a sweep. A trial is one training of the teacher, as in the other studies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from data.settings import UsageError
from pipeline.core.model_rules import efficientnet_rs_magnitude
from pipeline.models.efficientnet import PUBLISHED
from pipeline.studies.rows import Row, Study

Fields = Mapping[str, Any]
_DEFAULT = "efficientnetrs_b1"  # where the run's teacher is of another family
_MULTIPLE = 4  # of image sizes, in pixels
_OWN = "own size"


def _model(run: Fields) -> str:
    model = str(run["teacher"]["model"])
    return model if re.fullmatch(r"efficientnetrs_b\d", model) else _DEFAULT


def _below(run: Fields) -> str:
    """The next smaller model. Raises UsageError for B0."""
    model = _model(run)
    if model.endswith("b0"):
        raise UsageError(
            f"study efficientnet_rs: teacher.model={model} has no smaller one to compare with; give efficientnetrs_b1 … b7"
        )
    return f"{model[:-1]}{int(model[-1]) - 1}"


def _model_args(run: Fields) -> dict[str, Any]:
    return dict(run["teacher"]["model_args"]) if run["teacher"]["model"] == _model(run) else {}


def _share(share: float) -> Callable[[Fields], int]:
    """An image size as a share of the run's."""
    return lambda run: max(_MULTIPLE, round(share * run["teacher"]["image_size"] / _MULTIPLE) * _MULTIPLE)


def _size_below(run: Fields) -> int:
    """The smaller model's own size, in proportion to the run's as published."""
    own, below = (PUBLISHED[int(model[-1])].image_size for model in (_model(run), _below(run)))
    return round(run["teacher"]["image_size"] * below / own)


def _sized(size: Callable[[Fields], int]) -> dict[str, Any]:
    return {
        "teacher.image_size": size,
        "teacher.augment.magnitude": lambda run: efficientnet_rs_magnitude(size(run)),
    }


EFFICIENTNET_RS = Study(
    name="efficientnet_rs",
    source="in words, arXiv 2103.07579, figure 5 (ImageNet): at equal latency, better than the smaller network",
    base={
        "teacher.weights": None,
        "teacher.init": None,
        "teacher.init_head_lr_scale": 1.0,
        "teacher.freeze_backbone_epochs": 0.0,
        "teacher.model": _model,
        "teacher.model_args": _model_args,
    }
    | _sized(lambda run: int(run["teacher"]["image_size"])),
    rows=(
        Row(_OWN, {}),
        Row("85 % of the size", _sized(_share(0.85)), of=_OWN),
        Row("70 % of the size", _sized(_share(0.7)), of=_OWN),
        Row("55 % of the size", _sized(_share(0.55)), of=_OWN),
        Row("next smaller, its own size", {"teacher.model": _below} | _sized(_size_below), of=_OWN),
    ),
)
