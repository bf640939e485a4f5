"""The rules by which a recipe's fields follow the data's sizes.

A batch no larger than the labeled images; a number of steps, from which the epochs follow; a warm-up and evaluations as shares of the
training; an image size no larger than the images; a quota as a share of the unlabeled images per class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.core.recipes.sizes import Sizes

_MULTIPLE = 32  # an image size is a multiple of the strides of the models
TRAININGS = ("pretrain", "teacher", "student")


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingRule(_Rule):
    """How a training follows the number and the size of the images.

    Attributes:
        batch_size: images per step at most, pseudo-labeled ones included.
        least_batch_size: images per step at least.
        least_steps_per_epoch: the batch is small enough for so many steps in a pass over the images.
        steps, epochs: length of the training: whichever is longer.
        warmup: share of the training; `warmup_epochs`: at most so many.
        evaluations: measurements of the validation accuracy.
        freeze: share of the training in which only the head changes; only with `init`.
        image_size, least_image_size: pixels, at most and at least.
        cutout: side of the cut-out as a share of the image size.
    """

    batch_size: int
    least_batch_size: int = 1
    least_steps_per_epoch: float = 1
    steps: int = 0
    epochs: float = 0
    warmup: float
    warmup_epochs: float = math.inf
    evaluations: int
    freeze: float = 0
    image_size: int = 0
    least_image_size: int = _MULTIPLE
    cutout: float = 0


class QuotaRule(_Rule):
    """`select.per_class` as a share of the unlabeled images per class, at most `maximum`."""

    share: float
    maximum: int = 2**62


class Rules(_Rule):
    """`by_size` of a recipe's file.

    Attributes:
        found_on: sizes of the problem on which the recipe was found; its values stand until the data's sizes are known.
    """

    found_on: Sizes
    pretrain: TrainingRule | None = None
    teacher: TrainingRule | None = None
    student: TrainingRule | None = None
    select: QuotaRule


class Resolver:
    """Resolve rules for some sizes."""

    def __init__(
        self, rules: Rules, sizes: Sizes, value: Callable[[str], Any], is_given: Callable[[str], bool]
    ) -> None:
        """
        Args:
            value: the value of a dotted field without these rules.
            is_given: whether something that wins over a recipe sets a field, so that rules for other fields go by it.
        """
        self._rules, self._sizes, self._value, self._is_given = rules, sizes, value, is_given
        self._found: dict[str, tuple[Any, str]] = {}

    def resolve(self) -> dict[str, tuple[Any, str]]:
        """Dotted field → value and reason, given fields included. What needs unlabeled images is left out while there are none."""
        for name in TRAININGS:
            rule = getattr(self._rules, name)
            if rule is not None and (name != "pretrain" or self._sizes.unlabeled):
                self._training(name, rule)
        if self._sizes.unlabeled and self._sizes.classes:
            self._quota(self._rules.select)
        return self._found

    def _set(self, field: str, value: Any, reason: str) -> None:
        self._found[field] = value, reason

    def _now(self, field: str) -> Any:
        """The value in force: given, or by a rule above, or the recipe's or the default."""
        return self._found[field][0] if field in self._found and not self._is_given(field) else self._value(field)

    def _training(self, name: str, rule: TrainingRule) -> None:
        images, noun = self._sizes.labeled, "labeled images"
        if name == "pretrain":
            images, noun = images + self._sizes.unlabeled, "images"
        share = 1 + int(self._now("student.unlabeled_ratio")) if name == "student" else 1
        self._batch_size(name, rule, images, share)
        per_step = max(1, int(self._now(f"{name}.batch_size")) // share)
        self._epochs(name, rule, images, per_step, noun)
        self._parts(name, rule)
        if rule.image_size and self._sizes.side:
            self._image_size(name, rule)
        if rule.cutout:
            size = int(self._now(f"{name}.image_size"))
            self._set(f"{name}.augment.cutout", round(rule.cutout * size), f"{rule.cutout:.0%} of {size} px")

    def _batch_size(self, name: str, rule: TrainingRule, images: int, share: int) -> None:
        workers = max(1, int(self._now(f"{name}.workers")))
        fitting = 2 ** int(math.log2(max(1, images / rule.least_steps_per_epoch)))
        per_step = min(rule.batch_size // share, max(fitting, rule.least_batch_size // share, 1))
        per_step = max(1, per_step // workers) * workers
        why = f"{images:,} images; at most {rule.batch_size:,}"
        why += f", at least {rule.least_batch_size:,}" if rule.least_batch_size > 1 else ""
        why += f", {rule.least_steps_per_epoch:g} steps an epoch or more" if rule.least_steps_per_epoch > 1 else ""
        self._set(f"{name}.batch_size", per_step * share, why)

    def _epochs(self, name: str, rule: TrainingRule, images: int, per_step: int, noun: str) -> None:
        by_steps = math.floor(rule.steps * per_step / images * 10_000) / 10_000  # down: the steps are rounded up
        if by_steps > rule.epochs:
            self._set(f"{name}.epochs", by_steps, f"{rule.steps:,} steps of {per_step:,} {noun}")
        else:
            steps = math.ceil(rule.epochs * images / per_step)
            self._set(f"{name}.epochs", rule.epochs, f"{steps:,} steps of {per_step:,} {noun}")

    def _parts(self, name: str, rule: TrainingRule) -> None:
        """Fields that are a share of the training."""
        epochs = float(self._now(f"{name}.epochs"))
        warmup = min(_rounded(rule.warmup * epochs), rule.warmup_epochs)
        self._set(f"{name}.warmup_epochs", warmup, f"{warmup / epochs:.1%} of the training")
        self._set(f"{name}.eval_every_epochs", _rounded(epochs / rule.evaluations), f"{rule.evaluations} evaluations")
        if rule.freeze and self._now(f"{name}.init") is not None:
            frozen = _rounded(rule.freeze * epochs)
            self._set(f"{name}.freeze_backbone_epochs", frozen, f"the head alone for {rule.freeze:.0%} of the training")

    def _image_size(self, name: str, rule: TrainingRule) -> None:
        side = self._sizes.side
        fitting = max(rule.least_image_size, math.ceil(side / _MULTIPLE) * _MULTIPLE)
        limits = f"at least {rule.least_image_size}, at most {rule.image_size}"
        self._set(f"{name}.image_size", min(rule.image_size, fitting), f"the images' {side} px; {limits}")

    def _quota(self, rule: QuotaRule) -> None:
        mean = self._sizes.unlabeled / self._sizes.classes
        quota = min(rule.maximum, max(1, int(rule.share * mean)))
        why = f"{rule.share:.0%} of {self._sizes.unlabeled:,} unlabeled images / {self._sizes.classes:,} classes"
        self._set("select.per_class", quota, why + (f", at most {rule.maximum:,}" if quota == rule.maximum else ""))


def _rounded(epochs: float) -> float:
    return float(f"{epochs:.4g}")
