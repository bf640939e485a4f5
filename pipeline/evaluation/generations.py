"""generations=auto: add generations while the student beats its teacher on the validation images by more than chance.

The rule: the student's gain in top-1 exceeds `MIN_STANDARD_ERRORS` standard errors of the paired difference, and there are fewer than
`max_generations`. Test images take no part: a choice made by them would bias what they measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from pipeline.inference.accuracy import Comparison

MIN_STANDARD_ERRORS = 1.0  # that a gain must exceed
RULE = f"another generation when the student's gain on the validation images is more than {MIN_STANDARD_ERRORS:g} standard error of it"


@dataclass(frozen=True)
class Decision:
    """A student compared with its teacher on the validation images, without noise. Accuracies are fractions."""

    teacher_top1: float
    student_top1: float
    comparison: Comparison

    @property
    def goes_on(self) -> bool:
        """Whether the rule asks for another generation."""
        return self.comparison.difference > MIN_STANDARD_ERRORS * self.comparison.error

    def describe(self, generation: int, max_generations: int) -> str:
        """`generation 1: student 84.20 %, teacher 81.60 % on 500 validation images, +2.60 ± 0.90 points: …`."""
        found = self.comparison
        head = f"generation {generation}: student {self.student_top1:.2%}, teacher {self.teacher_top1:.2%} on {found.images:,}"
        gain = f"validation images, {100 * found.difference:+.2f} ± {100 * found.error:.2f} points"
        return f"{head} {gain}: {self._describe_outcome(generation, max_generations)}"

    def _describe_outcome(self, generation: int, max_generations: int) -> str:
        if not self.goes_on:
            return f"not more than {MIN_STANDARD_ERRORS:g} standard error, so this is the last"
        if generation >= max_generations:
            return f"more than {MIN_STANDARD_ERRORS:g} standard error, but max_generations={max_generations}"
        return f"more than {MIN_STANDARD_ERRORS:g} standard error, so generation {generation + 1} follows"


def all_layouts(config: Config) -> list[Layout]:
    """Layouts of all generations that there may be."""
    return [
        Layout(config.run_dir, number + 1, labels_from=config.labels_from)
        for number in range(config.most_generations())
    ]


def known_layouts(config: Config) -> list[Layout]:
    """Layouts of the generations that are certain; with `auto`, the first and each that a decision asks for."""
    layouts = all_layouts(config)
    if config.generations != "auto":
        return layouts
    decisions = [read_decision(layout) for layout in layouts]
    number = next((n for n, found in enumerate(decisions) if found is None or not found.goes_on), len(layouts))
    return layouts[: number + 1]


def read_decision(layout: Layout) -> Decision | None:
    """The decision that `decide` (decide.py) committed; None without one, or if it is of other models than there are now."""
    record = done_record(layout.decision)
    models = {role: done_record(folder) for role, folder in layout.models.items()}
    if record is None or any(
        model is None or model["digest"] != record["fingerprint"]["inputs"][role] for role, model in models.items()
    ):
        return None
    found = record["summary"]
    return Decision(found["teacher_top1"], found["student_top1"], Comparison(**found["comparison"]))


def summarize(layouts: Sequence[Layout]) -> dict[str, Any]:
    """Validation top-1 per generation (0: the first teacher), the best one and its folder, and the decisions.

    Empty before there is a student, or without validation images. Of equally good generations the earliest is the best.
    """
    folders = {0: layouts[0].teacher} | {layout.generation: layout.student for layout in layouts}
    records = {number: record for number, folder in folders.items() if (record := done_record(folder)) is not None}
    top1 = {
        number: record["summary"]["validation_top1"]
        for number, record in records.items()
        if "validation_top1" in record["summary"]
    }
    if len(top1) < 2:
        return {}
    best = max(top1, key=lambda number: (top1[number], -number))
    decisions = {layout.generation: found for layout in layouts if (found := read_decision(layout)) is not None}
    return {
        "best": best,
        "best_folder": folders[best].removeprefix(storage.join(layouts[0].run_dir, "")),
        "validation_top1": {str(number): value for number, value in top1.items()},
        "decisions": {str(number): asdict(found) | {"goes_on": found.goes_on} for number, found in decisions.items()},
    }


def describe_decision(config: Config, layout: Layout) -> str:
    """With generations=auto: the decision after this generation, or before there is one, the rule."""
    if (found := read_decision(layout)) is not None:
        return found.describe(layout.generation, config.max_generations)
    return f"generation {layout.generation}: then {RULE}; at most max_generations={config.max_generations}"


def describe_best(summary: Mapping[str, Any]) -> str:
    """`best on the validation images: generation 2, 85.10 % (gen-2/student)`."""
    best = summary["best"]
    name = f"generation {best}" if best else "the first teacher"
    top1 = summary["validation_top1"][str(best)]
    return f"best on the validation images: {name}, {top1:.2%} ({summary['best_folder']})"
