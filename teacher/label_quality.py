"""What the validation images say about pseudo-labels before a student learns from them: facts, and the sentences that state them.

Console (after stage=label and stage=select) and report take both from here. Only validation images take part: neither test images nor
the truth of unlabeled ones. So an estimate holds for images like the labeled ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from teacher.validation_labels import Precision, ValidationLabels

POOR_CLASS = 0.3  # precision below which a class is named, if its 95 % interval lies below one half
DOUBTFUL = 0.7  # precision below which there is advice
COLLAPSE_SHARE = 0.9  # labels collapse if half as many classes hold this share as of the validation images
_NAMED = 5  # classes in a sentence
MIN_IMAGES = 20  # validation images, fewer say nothing of a share
_MIN_GAIN = 0.05  # of precision, at that threshold
_UNLIKE = 0.6  # share of unlabeled images at or above the threshold ÷ that of validation images, below which they are another kind
_UNMEASURED = 0.1  # share of kept labels without an estimate above which the sentence says so


@dataclass(frozen=True)
class Collapse:
    """Few classes hold most labels: `classes` hold COLLAPSE_SHARE of them, where the validation images' true labels need `usual`."""

    classes: int
    usual: int
    largest: Mapping[str, float]  # name → share of the labels


@dataclass(frozen=True)
class Reach:
    """Shares of the validation and of the unlabeled images whose label is at or above its threshold."""

    validation: float
    unlabeled: float

    @property
    def differs(self) -> bool:
        """Whether the unlabeled images are clearly less sure, as images of another kind are."""
        return self.unlabeled < _UNLIKE * self.validation


@dataclass(frozen=True)
class HigherThreshold:
    """A threshold at which more labels are right, and the share of the validation images that reach it."""

    threshold: float
    precision: float
    share: float


@dataclass(frozen=True)
class LabelQuality:
    """What is known about the labels of a generation, all or the kept ones.

    Attributes:
        what: `labels` or `kept labels`.
        labels: number of pseudo-labels.
        validation_images: number of validation images.
        images: validation images with such a label: for the kept labels, as sure as the least sure one of their class.
        precision: estimated fraction of right labels; None without such images.
        error: its standard error.
        unmeasured: share of the labels whose class has no such image; they are not in the estimate.
        poor: classes of which most labels are wrong, by name, least precise first.
        never: classes of validation images that are no validation image's label.
        collapse: None if the labels do not collapse to few classes.
        empty: reason → names of the classes without a kept label.
        reach: None for all labels, and without validation images.
        higher: None if no threshold above the present one is clearly better.
    """

    what: str
    labels: int
    validation_images: int
    images: int
    precision: float | None
    error: float
    unmeasured: float
    poor: Mapping[str, Precision]
    never: tuple[str, ...]
    collapse: Collapse | None
    empty: Mapping[str, tuple[str, ...]]
    reach: Reach | None
    higher: HigherThreshold | None
    num_classes: int

    @property
    def is_of_kept(self) -> bool:
        """Whether it is about the kept labels, and not all."""
        return self.what == "kept labels"

    def headline(self) -> str:
        """`by validation, 55.0 % ± 3.1 of the 575 kept labels are right (…)`, or why that is not known."""
        unknown = f"validation does not say how many of the {self.labels:,} {self.what} are right"
        if not self.validation_images:
            return f"{unknown}: there are no validation images (data.validation); a few hundred labeled ones tell"
        if self.precision is None or self.images < MIN_IMAGES:
            sure = (
                f"{self.images:,} of the {self.validation_images:,} validation images"
                + " are as sure" * self.is_of_kept
            )
            return f"{unknown}: only {sure}, where {MIN_IMAGES} say something"
        as_sure, ending = (f"{self.images:,} of the ", " are as sure") if self.is_of_kept else ("", "")
        if self.unmeasured > _UNMEASURED:
            ending += f"; none in the classes of {self.unmeasured:.0%} of the {self.what}"
        return (
            f"by validation, {_percent(self.precision)} ± {100 * self.error:.1f} of the {self.labels:,} {self.what} are right "
            f"(± is one standard error; {as_sure}{self.validation_images:,} validation images{ending})"
        )

    def warnings(self) -> list[str]:
        """Sentences on poor, unused and empty classes and on collapse; none if there is nothing to warn of."""
        found = []
        if self.poor:
            classes = [
                f"{name!r} {_percent(one.right / one.images)} of {one.images}" for name, one in self.poor.items()
            ]
            found.append(f"classes below {_percent(POOR_CLASS, 0)}, on the validation images: {_some(classes)}")
        if self.never:
            found.append(f"the teacher gives no validation image the label {_some([*map(repr, self.never)])}")
        if (one := self.collapse) is not None:
            largest = [f"{name!r} {_percent(share, 0)}" for name, share in one.largest.items()]
            which = "labels at or above the threshold" if self.is_of_kept else "labels"
            found.append(
                f"the {which} collapse to few classes: {one.classes} of {self.num_classes} hold {_percent(COLLAPSE_SHARE, 0)} of them, "
                f"where the validation images' own labels need {one.usual}; the largest: {_some(largest)}"
            )
        for reason, names in self.empty.items():
            head = f"{len(names)} of {self.num_classes} classes {'have' if len(names) > 1 else 'has'} no kept label"
            found.append(f"{head}: {_some([*map(repr, names)])} ({reason})")
        if self.reach is not None and self.reach.differs:
            found.append(
                f"{_percent(self.reach.unlabeled, 0)} of the unlabeled images reach the threshold, but "
                f"{_percent(self.reach.validation, 0)} of the validation images: many are probably unlike the labeled ones"
            )
        return found

    def advice(self, doubtful_below: float = DOUBTFUL) -> list[str]:
        """What usually helps against what `warnings` say, or a precision below `doubtful_below`; none if all is well."""
        doubtful = self.precision is not None and self.precision < doubtful_below
        return list(self._advice()) if doubtful or self.warnings() else []

    def _advice(self) -> Iterator[str]:
        if self.empty:
            yield "a lower select.confidence_threshold or select.target_precision, for classes without a kept label"
        elif (one := self.higher) is not None:
            yield (
                f"a higher threshold: with select.confidence_threshold={one.threshold:.2f}, {_percent(one.precision)} of the "
                f"validation images' labels are right, and {_percent(one.share, 0)} of these images have one"
            )
        if self.reach is not None and self.reach.differs:
            yield "unlabeled images of the same kind as the labeled ones (data.unlabeled, data.exclude)"
        classes = [*self.poor, *self.never]
        whose = f", above all of {_some([*map(repr, classes)])}" if classes else ""
        yield f"a better teacher: more labeled images{whose}, or first weights from elsewhere (teacher.init)"


def judge_labels(validation: ValidationLabels, summary: Mapping[str, Any]) -> LabelQuality:
    """Judge all labels of a generation. `summary`: of stage=label's done-record."""
    names = _names(summary["class_names"], summary["num_classes"])
    everything = np.zeros(len(names), np.float32)
    found = validation.at(everything)
    precision = found.right / found.images if found.images else None
    true, predicted = (np.bincount(each, minlength=len(names)) for each in (validation.label, validation.predicted))
    return LabelQuality(
        what="labels",
        labels=summary["labels"],
        validation_images=len(validation),
        images=found.images,
        precision=precision,
        error=sqrt(precision * (1 - precision) / found.images) if precision is not None else 0.0,
        unmeasured=0.0,
        poor=_poor(_by_class(validation, everything), names),
        never=tuple(names[index] for index in np.flatnonzero((true > 0) & (predicted == 0))),
        collapse=_collapse(predicted, true, names),
        empty={},
        reach=None,
        higher=None,
        num_classes=len(names),
    )


def judge_kept(validation: ValidationLabels, selection: Mapping[str, Any]) -> LabelQuality:
    """Judge the kept labels: the validation images as sure as those of each class, weighted as the classes are kept.

    With a target precision, only by the half of the images that did not choose the thresholds.

    Args:
        selection: the content of selection.json.
    """
    classes, rule = selection["classes"], selection["rule"]
    names = [entry.get("name", f"class {entry['class']}") for entry in classes]
    if (selection.get("precision") or {}).get("target") is not None:
        validation = validation.halves()[1]
    kept, available = (np.array([entry[key] for entry in classes], np.int64) for key in ("kept", "available"))
    cut_offs = np.array([entry["cut_off"]["confidence"] for entry in classes], np.float32)
    cut_offs[kept == 0] = np.inf
    by_class = _by_class(validation, cut_offs)
    precision, error, unmeasured = _weighted(by_class, kept)
    true = np.bincount(validation.label, minlength=len(names))
    return LabelQuality(
        what="kept labels",
        labels=int(kept.sum()),
        validation_images=len(validation),
        images=sum(one.images for one in by_class),
        precision=precision,
        error=error,
        unmeasured=unmeasured,
        poor=_poor(by_class, names),
        never=(),
        collapse=_collapse(available, true, names),
        empty=_empty(selection, names),
        reach=_reach(validation, selection),
        higher=_higher(validation, min(rule["class_thresholds"] or [rule["confidence_threshold"]]), precision),
        num_classes=len(names),
    )


def print_quality(stage: str, quality: LabelQuality) -> None:
    """Print what is known, what to be warned of, and what usually helps."""
    lines = [quality.headline(), *quality.warnings()]
    if advice := quality.advice():
        lines.append(f"what usually helps: {'; '.join(advice)}")
    print(*(f"{stage}: {line}" for line in lines), sep="\n", flush=True)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    return list(class_names) if class_names else [f"class {index}" for index in range(num_classes)]


def _by_class(validation: ValidationLabels, thresholds: np.ndarray) -> list[Precision]:
    """Precision of each class's labels at or above its threshold."""
    above = validation.take(validation.confidence >= thresholds[validation.predicted])
    size = len(thresholds)
    images = np.bincount(above.predicted, minlength=size)
    right = np.bincount(above.predicted[above.predicted == above.label], minlength=size)
    return [Precision(*counts) for counts in zip(images.tolist(), right.tolist(), strict=True)]


def _weighted(by_class: Sequence[Precision], kept: np.ndarray) -> tuple[float | None, float, float]:
    """Precision weighted by kept labels, its standard error, and the share of kept labels in classes without a validation image.

    A class's variance is that of (right + 1) / (images + 2), so that a class with one image is not taken for certain.
    """
    images, right = (np.array([getattr(one, name) for one in by_class], float) for name in ("images", "right"))
    measured = (images > 0) & (kept > 0)
    if not measured.any():
        return None, 0.0, 1.0
    share = kept[measured] / kept[measured].sum()
    images, right = images[measured], right[measured]
    likely = (right + 1) / (images + 2)
    error = sqrt((share**2 * likely * (1 - likely) / images).sum())
    return float((share * right / images).sum()), error, float(1 - kept[measured].sum() / kept.sum())


def _poor(by_class: Sequence[Precision], names: Sequence[str]) -> dict[str, Precision]:
    found = [(one, name) for one, name in zip(by_class, names, strict=True) if one.images and _is_poor(one)]
    return {name: one for one, name in sorted(found, key=lambda pair: pair[0].right / pair[0].images)}


def _is_poor(one: Precision) -> bool:
    values = one.as_json()
    return bool(values["precision"] < POOR_CLASS and values["high"] < 0.5)


def _collapse(labels: np.ndarray, true: np.ndarray, names: Sequence[str]) -> Collapse | None:
    """Compare labels by class with the validation images' true labels by class, int64 [num_classes] each."""
    if not labels.any() or not true.any():
        return None
    classes, usual = _classes_with_share(labels), _classes_with_share(true)
    if 2 * classes > usual:
        return None
    largest = np.argsort(-labels, kind="stable")[:classes]
    return Collapse(classes, usual, {names[index]: float(labels[index] / labels.sum()) for index in largest})


def _classes_with_share(counts: np.ndarray) -> int:
    """Number of largest classes that hold COLLAPSE_SHARE of all."""
    total = np.cumsum(np.sort(counts)[::-1])
    return int((total < COLLAPSE_SHARE * total[-1]).sum()) + 1


def _empty(selection: Mapping[str, Any], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for index in selection["empty_classes"]:
        reason = _why_empty(selection, index)
        found[reason] = (*found.get(reason, ()), names[index])
    return found


def _why_empty(selection: Mapping[str, Any], index: int) -> str:
    rule = selection["rule"]
    threshold = (rule["class_thresholds"] or [rule["confidence_threshold"]] * (index + 1))[index]
    if selection.get("kept_from") is not None:
        return "none of the images of the generation before has this label now"
    if threshold > 1:
        return "select.target_precision is reached at no threshold"
    counts = selection["reasons"]
    others = " but those left out as duplicates or excluded" if _left_out(counts) else ""
    return f"no label is at or above the threshold {threshold:.4g}{others}"


def _left_out(counts: Mapping[str, int]) -> int:
    return sum(number for reason, number in counts.items() if reason not in ("below_threshold", "over_quota"))


def _reach(validation: ValidationLabels, selection: Mapping[str, Any]) -> Reach | None:
    """None without validation images, or where images were reused instead of selected."""
    rule = selection["rule"]
    rows = selection["totals"]["rows"] - _left_out(selection["reasons"])
    if not len(validation) or not rows or selection.get("kept_from") is not None:
        return None
    size = len(selection["classes"])
    thresholds = np.array(rule["class_thresholds"] or [rule["confidence_threshold"]] * size, np.float32)
    return Reach(
        validation.at(thresholds).images / len(validation), (rows - selection["reasons"]["below_threshold"]) / rows
    )


def _higher(validation: ValidationLabels, threshold: float, precision: float | None) -> HigherThreshold | None:
    """The lowest of 0.05, 0.1 … 0.95 above the present threshold at which clearly more labels are right."""
    for higher in np.arange(1, 20) / 20 if precision is not None else ():
        above = validation.take(validation.confidence >= np.float32(higher))
        if higher <= threshold or len(above) < MIN_IMAGES:
            continue
        found = float((above.label == above.predicted).mean())
        if precision is not None and found >= precision + _MIN_GAIN:
            return HigherThreshold(float(higher), found, len(above) / len(validation))
    return None


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f} %"


def _some(words: Sequence[str]) -> str:
    rest = len(words) - _NAMED
    return ", ".join(words[:_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")
