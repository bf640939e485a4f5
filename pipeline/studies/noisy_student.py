"""Noisy Student's own ablations (arXiv 1911.04252) as rows, for `stage=ablate`: teacher, labels and student of the run's recipe.

One teacher and its labels serve all rows of a seed; a row whose labels differ makes its own. The paper's figures are not at hand;
`finding` is what it says in words.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.studies.rows import Row, Study

Fields = Mapping[str, Any]
TEACHER, RECIPE, EQUAL = "teacher", "recipe", "student of equal size"
_PER_STEP = ("epochs", "warmup_epochs", "eval_every_epochs")

# Crop and flip remain, as in ResNet-RS's baseline.
_NO_INPUT_NOISE: dict[str, Any] = {"student.mixup": 0.0} | {
    f"student.augment.{name}": 0
    for name in ("num_ops", "rotation", "zoom", "translate", "shear", "brightness", "contrast", "cutout")
}
_NO_MODEL_NOISE = {"student.dropout": 0.0, "student.stochastic_depth": 0.0}


def _ratio(ratio: int) -> dict[str, Any]:
    """Another share of labeled images in as many steps: epochs count labeled images."""

    def rescaled(name: str) -> Callable[[Fields], float]:
        return lambda own: float(own["student"][name] * (1 + own["student"]["unlabeled_ratio"]) / (1 + ratio))

    return {"student.unlabeled_ratio": ratio} | {f"student.{name}": rescaled(name) for name in _PER_STEP}


def _of_teacher(width: float) -> dict[str, Any]:
    """The teacher's network, or one of `width` times as many channels."""

    def model_args(own: Fields) -> dict[str, Any]:
        args = copy.deepcopy(dict(own["teacher"]["model_args"]))
        return args if width == 1 else args | {"width": args.get("width", 1.0) * width}

    return {"student.model": lambda own: own["teacher"]["model"], "student.model_args": model_args}


def _row(name: str, changes: Mapping[str, Any], finding: str, of: str = RECIPE) -> Row:
    return Row(name, changes, of=of, needs=TEACHER, finding=finding)


NOISY_STUDENT = Study(
    name="noisy_student",
    source="in words, arXiv 1911.04252 (ImageNet); no figures at hand",
    base={"generations": 1, "label.augment": None, "student.from_teacher": False},
    rows=(
        Row(TEACHER, {}),
        _row(RECIPE, {}, "better", of=TEACHER),
        _row("no input noise", _NO_INPUT_NOISE, "worse"),
        _row("no model noise", _NO_MODEL_NOISE, "worse"),
        _row("noised teacher", {"label.augment": lambda own: own["student"]["augment"]}, "worse"),
        _row("soft labels", {"student.pseudo_labels": "soft"}, "equal, better out of domain"),
        _row("hard labels", {"student.pseudo_labels": "hard"}, "equal, worse out of domain"),
        _row("no balancing", {"select.per_class": None}, "worse for small models"),
        _row("ratio 1", _ratio(1), ""),
        _row("ratio 3", _ratio(3), ""),
        _row("ratio 7", _ratio(7), ""),
        _row("smaller student", _of_teacher(0.5), ""),
        _row(EQUAL, _of_teacher(1), ""),
        _row("larger student", _of_teacher(1.5), "better"),
        _row("from teacher's weights", {"student.from_teacher": True}, "worse", of=EQUAL),
        Row("2 generations", {"generations": 2}, of=RECIPE, needs=RECIPE, finding="better"),
        Row("3 generations", {"generations": 3}, of="2 generations", needs="2 generations", finding="better"),
    ),
    leaves_out=True,
)
