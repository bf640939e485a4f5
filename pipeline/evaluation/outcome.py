"""Whether a student beat its teacher, which console and report say first; and if not, what to try, from this run's own figures.

The figures are those of labels, selection and trainings. Neither test images nor the truth of unlabeled images take part in the advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from data import storage
from data.labels.label_files import COPIES_REMEDY
from data.shards.split import open_split
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import SELECTION_NAME, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from teacher.label_quality import judge_kept
from teacher.validation_labels import ValidationLabels

CLEAR = 2.0  # standard errors that a clear difference exceeds
_GOOD_LABELS = 0.9  # precision of kept labels; the demo's, 92 % right, make its student 2.6 points better
_FEW_LABELS = 100  # labeled images a class, below which first weights from elsewhere usually help
_FEW_PASSES = 5  # over the pseudo-labels; the demo's student makes 9
_FEW_KEPT = 2  # kept labels per labeled image

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A student beside a teacher on the same images.

    Attributes:
        student, teacher: names, as `student 2` and `teacher`.
        difference: top-1 of the student − that of the teacher, a fraction.
        error: its standard error.
        images: number of images.
        kind: of these: `test` or `validation`.
    """

    student: str
    teacher: str
    difference: float
    error: float
    images: int
    kind: str

    @property
    def is_clear(self) -> bool:
        """Whether the difference exceeds CLEAR standard errors."""
        return abs(self.difference) >= CLEAR * self.error and self.difference != 0

    @property
    def is_gain(self) -> bool:
        """Whether the student is clearly better."""
        return self.is_clear and self.difference > 0

    @property
    def is_loss(self) -> bool:
        """Whether the student is clearly worse."""
        return self.is_clear and self.difference < 0

    def verdict(self) -> str:
        """`The student is 3.67 ± 1.20 points worse than the teacher on 600 test images`."""
        amount, error = 100 * self.difference, 100 * self.error
        student, teacher = (name if name[-1].isdigit() else f"the {name}" for name in (self.student, self.teacher))
        ending = f"{teacher} on {self.images:,} {self.kind} images"
        if not self.is_clear:
            shown = f"{amount:+.2f}".replace("-", "−")
            return f"No clear difference: {student} is {shown} ± {error:.2f} points from {ending}"
        better = "better" if amount > 0 else "worse"
        return f"{student[0].upper()}{student[1:]} is {abs(amount):.2f} ± {error:.2f} points {better} than {ending}"


def validation_outcome(student: str, teacher: str, one: Record, two: Record) -> Outcome | None:
    """Compare two models by their accuracies on the validation images; None where these are not known.

    Only the two accuracies are recorded, so the error is that of two independent ones: usually above that of the paired difference.

    Args:
        one, two: summaries of the done-records of teacher and student.
    """
    names = ("validation_top1", "validation_images")
    if any(name not in summary for name in names for summary in (one, two)):
        return None
    images, (before, after) = one["validation_images"], (summary["validation_top1"] for summary in (one, two))
    if images != two["validation_images"] or not images:
        return None
    error = sqrt((before * (1 - before) + after * (1 - after)) / images)
    return Outcome(student, teacher, after - before, error, images, "validation")


def print_student(config: Config, layout: Layout) -> None:
    """Print how a finished student compares with its teacher on the validation images, and if it is no clear gain, what to try."""
    records = [done_record(folder) for folder in (layout.teacher, layout.student)]
    if records[0] is None or records[1] is None:
        return
    found = validation_outcome("student", "teacher", *(record["summary"] for record in records if record))
    if found is None:
        print(
            "student: without validation images (data.validation), nothing says yet whether it is better than its teacher"
        )
        return
    print(f"student: {found.verdict()} (± is one standard error)")
    print_advice([] if found.is_gain else what_to_try(config, layout))


def print_advice(advice: list[str]) -> None:
    """Print what to try, one a line; nothing without advice."""
    if advice:
        lines = [f"  {number}. {words}" for number, words in enumerate(advice, start=1)]
        print("What to try, by this run's figures:", *lines, sep="\n", flush=True)


def what_to_try(config: Config, layout: Layout) -> list[str]:
    """What may help a student that is not better than its teacher, the likeliest first; empty without a student."""
    student, labels = done_record(layout.student), done_record(layout.labels)
    if student is None:
        return []
    selection = _selection_of(layout, student)
    num_labeled = _num_labeled(config, layout)
    found: list[str] = []
    if labels is not None and selection is not None:
        quality = judge_kept(ValidationLabels.read(layout.labels), selection)
        if advice := quality.advice(_GOOD_LABELS):
            known = ". ".join([quality.headline(), *quality.warnings()])
            found.append(f"better labels: {known}. What usually helps: {'; '.join(advice)}")
        found += _of_number(selection, labels["summary"]["labels"], num_labeled)
    found += _of_first_weights(layout, student, labels, num_labeled)
    if selection is not None:
        found += _of_length(student, selection)
    return [*found, "one training says little: other seeds (seed=1) tell what is chance"]


def _selection_of(layout: Layout, student: Record) -> dict[str, Any] | None:
    """Content of the selection.json that a student learned from; None if it is gone."""
    for name in storage.list_names(layout.selections):
        folder = storage.join(layout.selections, name)
        record = done_record(folder)
        if record is not None and record["digest"] == student["fingerprint"]["inputs"].get("selection"):
            return read_output_json(folder, SELECTION_NAME, record, COPIES_REMEDY)
    return None


def _num_labeled(config: Config, layout: Layout) -> int | None:
    """Number of labeled images; None where the shards are gone."""
    with suppress(ValueError, OSError):
        return open_split(config.data.labeled, layout.indexes).num_samples
    return None


def _of_number(selection: Record, num_labels: int, num_labeled: int | None) -> Iterator[str]:
    kept = selection["totals"]["kept"]
    if num_labeled is None or kept >= _FEW_KEPT * num_labeled:
        return
    yield (
        f"more pseudo-labels: {kept:,} of {num_labels:,} are kept, for {num_labeled:,} labeled images (select.per_class, "
        "select.confidence_threshold, more images in data.unlabeled)"
    )


def _of_first_weights(layout: Layout, student: Record, labels: Record | None, num_labeled: int | None) -> Iterator[str]:
    teacher = done_record(replace(layout, generation=1).teacher) or {"summary": {}}
    source = next(
        (teacher["summary"][name] for name in ("begun_with", "trained_elsewhere") if name in teacher["summary"]), None
    )
    fields = student["fingerprint"]["config"]
    num_classes = labels["summary"]["num_classes"] if labels is not None else None
    if source is None and num_labeled is not None and num_classes and num_labeled < _FEW_LABELS * num_classes:
        yield (
            f"first weights from elsewhere: {num_labeled:,} labeled images, {num_labeled / num_classes:.0f} a class, teach a network "
            "little about what pictures look like (teacher.init=pretrained, or stage=pretrain)"
        )
    if not (fields.get("student.from_teacher") or fields.get("student.init")):
        began = f", where the teacher began with {source}" if source else ""
        yield f"a student that begins as its teacher: this one began with random weights{began} (student.init=teacher)"


def _of_length(student: Record, selection: Record) -> Iterator[str]:
    fields, copies = student["fingerprint"]["config"], selection["totals"]["copies"]
    ratio, batch_size = fields.get("student.unlabeled_ratio"), fields.get("student.batch_size")
    steps = student["summary"].get("steps")
    if not (ratio and batch_size and steps and copies):
        return
    passes = steps * batch_size * ratio / (1 + ratio) / copies
    if passes < _FEW_PASSES:
        yield f"a longer training: the student saw each pseudo-label {passes:.1f} times in {steps:,} steps (student.epochs)"
