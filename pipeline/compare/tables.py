"""The rows of the comparison: accuracies with paired intervals, labels, costs, classes; a column per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compare.runs import Run, difference
from pipeline.compare.settings import different_settings
from pipeline.core.timing import duration
from pipeline.inference.accuracy import Comparison
from pipeline.report.facts import Model, num_parameters
from pipeline.report.numbers import millions, percent, points, signed, with_error
from pipeline.report.sections.timeline import stage_times
from teacher.diff import changes, side

NONE = "–"
Rows = list[list[str]]


@dataclass(frozen=True)
class Table:
    """A block of rows: the first cell names the row, one more per run."""

    title: str
    rows: Rows


def tables(runs: Sequence[Run]) -> list[Table]:
    """All tables in their order, without rows that say nothing of any run."""
    settings = different_settings(runs) or [["no setting differs", *([""] * len(runs))]]
    found = [
        Table("Settings that differ", settings),
        Table("Accuracy", _accuracy(runs)),
        Table("Labels", _labels(runs)),
        Table("Cost", _cost(runs)),
    ]
    kept = (Table(table.title, [row for row in table.rows if set(row[1:]) != {NONE}]) for table in found)
    return [table for table in kept if table.rows]


def _difference(found: Comparison) -> str:
    return signed(100 * found.difference)


def interval(found: Comparison) -> str:
    """`+0.25 to +1.45`: the 95 % interval of a difference, in percentage points."""
    low, high = (signed(100 * value) for value in found.interval())
    return f"{low} to {high}"


def _row(name: str, runs: Sequence[Run], write: Callable[[Run], str]) -> list[str]:
    return [name, *map(write, runs)]


def _accuracy(runs: Sequence[Run]) -> Rows:
    first, base = runs[0], runs[0].name

    def against(model: Callable[[Run], Model | None], write: Callable[[Comparison], str]) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            found = None if run is first else difference(model(first), model(run))
            return NONE if found is None else write(found)

        return cell

    def own_gain(run: Run) -> str:
        found = difference(run.teacher, run.student)
        return NONE if found is None else points(found)

    def last(run: Run) -> Model:
        return run.last

    def teacher(run: Run) -> Model:
        return run.teacher

    return [
        _row("test images", runs, lambda run: f"{run.last.figures['images']:,}" if run.last.figures else NONE),
        _row("student, top-1", runs, lambda run: _top1(run.student)),
        _row(f"against {base}, points", runs, against(last, _difference)),
        _row("95 % interval of that", runs, against(last, interval)),
        _row(f"right here, wrong in {base}", runs, against(last, lambda found: f"{found.gained:,}")),
        _row(f"wrong here, right in {base}", runs, against(last, lambda found: f"{found.lost:,}")),
        _row("student, top-5", runs, lambda run: percent(run.last.figures.get("top5"))),
        _row("calibration error", runs, lambda run: percent(run.last.figures.get("calibration_error"))),
        _row("wrong under corruption", runs, _corrupted),
        _row("top-1, validation", runs, lambda run: percent(run.last.validation_top1)),
        _row("teacher, top-1", runs, lambda run: _top1(run.teacher)),
        _row(f"teacher against {base}'s, points", runs, against(teacher, _difference)),
        _row("95 % interval of teachers", runs, against(teacher, interval)),
        _row("student − its teacher, points", runs, own_gain),
    ]


def _top1(model: Model | None) -> str:
    return with_error(model.figures["top1"], model.figures["images"]) if model is not None and model.figures else NONE


def _corrupted(run: Run) -> str:
    found = run.last.figures.get("robustness")
    return NONE if found is None else percent(found["mean_corruption_error"], 1)


def _labels(runs: Sequence[Run]) -> Rows:
    rows = [
        _row("unlabeled images", runs, lambda run: _count(run, "label", "images")),
        _row("labels", runs, lambda run: _count(run, "label", "labels")),
        _row("kept", runs, lambda run: _count(run, "select", "kept")),
        _row("kept, with copies", runs, lambda run: _count(run, "select", "copies")),
        _row("labels that are right", runs, lambda run: percent(run.right.get("labels_right"))),
        _row("kept labels that are right", runs, lambda run: percent(run.right.get("kept_right"))),
    ]
    against = [_labels_against(runs[0], run) for run in runs]
    names = (
        f"labels that differ from {runs[0].name}'s",
        "kept in both",
        f"kept in {runs[0].name} alone",
        "kept here alone",
    )
    return rows + [[name, *cells] for name, cells in zip(names, zip(*against, strict=True), strict=True)]


def _count(run: Run, stage: str, name: str) -> str:
    summary = run.summary_of(stage)
    return NONE if summary is None or name not in summary else f"{summary[name]:,}"


def _labels_against(first: Run, run: Run) -> list[str]:
    """Labels that differ, and images kept by both, by the first alone, by this run alone; – where the images are others."""
    summaries = [(each.summary_of("label"), each.summary_of("select")) for each in (first, run)]
    if run is first or any(None in pair for pair in summaries):
        return [NONE] * 4
    if len({(labels or {}).get("corpus") for labels, _ in summaries}) > 1 or _classes(first) != _classes(run):
        return ["other images or classes", NONE, NONE, NONE]
    same_labels, same_selection = (first.digest_of(stage) == run.digest_of(stage) for stage in ("label", "select"))
    if same_labels and same_selection:
        return ["the same labels", _count(run, "select", "kept"), "0", "0"]
    before, after = (side({"1": each.generation.layout}, "1") for each in (first, run))
    found = changes(before, after)
    kept = found["kept"]
    differing = "the same labels" if same_labels else percent(found["flip_rate"])
    return [differing, *(f"{kept[name]:,}" for name in ("both", "only_before", "only_after"))]


def _classes(run: Run) -> list[str]:
    return run.facts.class_names


def _cost(runs: Sequence[Run]) -> Rows:
    times = [dict(stage_times(run.facts)) for run in runs]
    stages = list(dict.fromkeys(name for each in times for name in each))
    return [
        _row("network", runs, lambda run: run.last.architecture or NONE),
        _row("parameters", runs, lambda run: millions(num_parameters(run.last))),
        _row(
            "GFLOPs per image", runs, lambda run: f"{run.last.figures['flops'] / 1e9:.3g}" if run.last.figures else NONE
        ),
        _row("images/s, in batches", runs, lambda run: _speed(run, "images_per_s", "{:,.0f}")),
        _row("one image alone, ms", runs, lambda run: _speed(run, "latency_ms", "{:.2f}")),
        _row("speed measured on", runs, lambda run: _speed(run, "where", "{}")),
        *([f"time of {name}", *(duration(each[name]) if name in each else NONE for each in times)] for name in stages),
        ["time in all", *(duration(sum(each.values())) for each in times)],
    ]


def _speed(run: Run, name: str, form: str) -> str:
    speed = run.last.speed
    if speed is None:
        return NONE
    return form.format(speed[name]) + (", busy" if name == "where" and speed["busy"] else "")


@dataclass(frozen=True, eq=False)
class ClassChanges:
    """Classes that changed most from the first run.

    Attributes:
        runs: those with the first one's classes and test images, which is the first of them.
        names: of the classes, those that lost most first.
        top1: percent, float64 (runs, classes).
        num_classes: how many were tested.
    """

    runs: list[Run]
    names: list[str]
    top1: np.ndarray
    num_classes: int

    def rows(self) -> Rows:
        """(class, top-1 in the first run, change in each other run)."""
        return [
            [name, f"{values[0]:.1f}", *(signed(value - values[0]) for value in values[1:])]
            for name, values in zip(self.names, self.top1.T, strict=True)
        ]


def class_changes(runs: Sequence[Run], most: int) -> ClassChanges | None:
    """The `most` classes whose top-1 differs most from that in the first run; None without other runs on the same test images."""
    same = [run for run in runs if run is runs[0] or difference(runs[0].last, run.last) is not None]
    same = [run for run in same if _classes(run) == _classes(runs[0])]
    if len(same) < 2:
        return None
    top1 = 100 * np.array([run.last.figures["per_class_top1"] for run in same], float)
    change = np.abs(top1 - top1[0]).max(axis=0)
    known = np.flatnonzero(~np.isnan(change))
    chosen = known[np.argsort(-change[known], kind="stable")[:most]]
    chosen = chosen[np.argsort((top1[-1] - top1[0])[chosen], kind="stable")]
    return ClassChanges(same, [runs[0].facts.class_name(label) for label in chosen], top1[:, chosen], len(known))
