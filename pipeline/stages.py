"""The table of stages: one row each. Whoever needs a stage's name, folder, inputs or order reads it here.

A row is plain data. It names the function that runs the stage, which is imported only then: torch and Ray take seconds and most of a
gigabyte, which selection, status and comparison do without. A new stage is one row here and one package (CONTRIBUTING.md).

Entries of `fingerprint` and `reads` are dotted configuration fields, or whole sections. `FIELD if OTHER` counts only while OTHER is
set, `FIELD if OTHER=VALUE` only while OTHER has that value.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pkgutil import resolve_name
from typing import Any, Literal

from data.run_names import LABELS, SELECTIONS

Kind = Literal["generation", "study", "reader", "comparison"]
NUMERICS = ("seed", "device", "threads")  # what every trained or predicted number depends on
_HELP_WIDTH = 132
SPLIT_FIELDS = ("data.labeled", "data.validation", "data.test", "data.unlabeled")  # each names shards


@dataclass(frozen=True)
class StageRow:
    """One stage.

    Attributes:
        purpose: what --help says.
        run: `module:function`, called with (config, layout, force) for a stage of a generation and for a study, with
            (config, layouts) for a reader, and with (config, layouts, *`Command.compared`) for a comparison.
        kind: `generation`: run once per generation; `study`: of no generation; `reader` and `comparison`: take no lock.
        folder: below `gen-N/`, or below RUN for a stage that is made `once`; empty for a stage that has none there.
        fingerprint: the configuration that its output depends on.
        reads: the fields that name shards and files, checked before it runs; none for readers, which take what is there.
        upstream: name of an input in its fingerprint → the stage that makes it.
        is_long: it may take hours. Changed settings are refused before the command starts, and the time of stopped runs is recorded.
        followed_by: a stage that always runs after it.
        plan: of a study: `module:function` that prints what it would do, called with (config, layout).
        only_named: `stage=all` leaves it out.
        all_if: `FIELD=VALUE` with which `stage=all` runs it although it is `only_named`.
        only_first: later generations take this from the generation before.
        once: made once for the whole run, with the first generation.
    """

    name: str
    purpose: str
    run: str
    kind: Kind = "generation"
    folder: str = ""
    fingerprint: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    upstream: dict[str, str] = field(default_factory=dict)
    is_long: bool = False
    followed_by: str | None = None
    plan: str = ""
    only_named: bool = False
    all_if: str = ""
    only_first: bool = False
    once: bool = False

    def is_in_all(self, config: object) -> bool:
        """Whether `stage=all` runs it."""
        return not self.only_named or bool(self.all_if and _holds(self.all_if, config))


STAGES: tuple[StageRow, ...] = (
    StageRow(
        "pretrain",
        "teach a model features without labels, on labeled and unlabeled images; with teacher.init=pretrain also part of stage=all",
        "teacher.pretrain:pretrain",
        folder="pretrain",
        fingerprint=("pretrain", "select.copy_correlation if data.held_out_hashes", *NUMERICS),
        reads=("data.labeled", "data.unlabeled", "data.exclude", "data.held_out_hashes"),
        is_long=True,
        only_named=True,
        all_if="teacher.init=pretrain",
        once=True,
    ),
    StageRow(
        "teacher",
        "train on the labeled images (from teacher.init=FILE, if given), or take teacher.weights=FILE as they are",
        "teacher.train:train_teacher",
        folder="teacher",
        fingerprint=("teacher", "data.num_classes if data.num_classes", *NUMERICS),
        reads=("teacher.weights", "teacher.init", "data.exclude", "data.labeled", "data.validation"),
        is_long=True,
        only_first=True,
    ),
    StageRow(
        "label",
        "label every unlabeled image with the teacher (on Ray), then select",
        "teacher.labeling.stage:label",
        folder=LABELS,
        fingerprint=("label", *NUMERICS),
        reads=("teacher.ensemble", "data.unlabeled", "data.validation"),
        upstream={"teacher": "teacher"},
        is_long=True,
        followed_by="select",
    ),
    StageRow(
        "select",
        "select pseudo-labels again, with another threshold or quota; reads no image that it has compared before",
        "teacher.selection.stage:select",
        folder=SELECTIONS,
        fingerprint=("select",),
        reads=("data.held_out_hashes", "data.exclude"),
        upstream={"labels": "label"},
    ),
    StageRow(
        "student",
        "train a noised, larger model on labeled and pseudo-labeled images",
        "student.train:train_student",
        folder="student",
        fingerprint=("student", *NUMERICS),
        reads=(
            "student.init",
            "data.exclude",
            "data.labeled",
            "data.validation",
            "data.unlabeled if student.unlabeled_ratio",
        ),
        upstream={"selection": "select", "labels": "label"},
        is_long=True,
    ),
    StageRow(
        "evaluate",
        "measure teacher and student on the test images",
        "pipeline.evaluation.stage:evaluate",
        folder="evaluation",
        fingerprint=("evaluate", *NUMERICS),
        reads=("data.test",),
        upstream={"teacher": "teacher", "student": "student"},
    ),
    StageRow(
        "export",
        "write pseudo-labels for other projects: WebDataset shards, or labels alone",
        "pipeline.export.stage:export",
        fingerprint=("export", "seed if export.shuffle_shards"),
        reads=("data.exclude", "data.unlabeled"),
        upstream={"selection": "select", "labels": "label"},
        only_named=True,
    ),
    StageRow("report", "write RUN/report.html", "pipeline.report.build:write_report", kind="reader"),
    StageRow(
        "status",
        "print what is done, how far the rest is, and what stopped last (watch=true: until all is done)",
        "pipeline.planning.status:print_status",
        kind="reader",
        only_named=True,
    ),
    StageRow(
        "serve",
        "serve pseudo-labels over HTTP without a copy: labels are joined to the images while they are sent",
        "pipeline.serving.server:serve",
        kind="reader",
        only_named=True,
    ),
    StageRow(
        "suggest",
        "write the suggest.images unlabeled images whose labels would help most into RUN/suggestions: uncertain ones that differ",
        "pipeline.suggest.stage:suggest",
        kind="reader",
        only_named=True,
    ),
    StageRow(
        "advise",
        "print the best student of a finished scaling study within a budget: advise.hours, advise.latency_ms, advise.gpu_memory_gb",
        "pipeline.advise.stage:advise",
        kind="reader",
        only_named=True,
    ),
    StageRow(
        "diff",
        "print what changed between two generations, selections or exports (before=… after=…; by default the last two)",
        "teacher.diff:diff",
        kind="comparison",
        only_named=True,
    ),
    StageRow(
        "compare",
        "put runs side by side (runs=[runs/a,runs/b], or runs=runs/*): settings that differ, accuracies with paired intervals, labels, "
        "costs, classes; writes compare.html into the first",
        "pipeline.compare.stage:compare_runs",
        kind="comparison",
        only_named=True,
    ),
    StageRow(
        "ablate",
        "run a study, one change a row, several seeds (ablate.study=resnet_rs|weight_decay: of the teacher's recipe; noisy_student: of "
        "teacher, labels and student; scaling: width, depth, image size and length of ablate.grid)",
        "pipeline.studies.stage:ablate",
        kind="study",
        reads=(
            "data.exclude",
            "data.labeled",
            "data.validation",
            "data.unlabeled if ablate.study=noisy_student",
        ),
        plan="pipeline.studies.stage:plan_study",
        only_named=True,
    ),
    StageRow(
        "transfer",
        "compare the features of several models on other data sets (transfer.backbones, transfer.sets): linear probe, kNN, fine-tuning",
        "pipeline.transfer.stage:transfer",
        kind="study",
        plan="pipeline.transfer.stage:plan_transfer",
        only_named=True,
    ),
)


def find(stage: str) -> StageRow:
    """The row of a stage that exists."""
    return next(row for row in STAGES if row.name == stage)


def function_of(stage: str) -> Callable[..., Any]:
    """Import the function that runs a stage."""
    found: Callable[..., Any] = resolve_name(find(stage).run)
    return found


def names_of(*kinds: Kind) -> list[str]:
    """Names in the order of the table; without `kinds`, all."""
    return [row.name for row in STAGES if not kinds or row.kind in kinds]


def with_folder(generation: int | None = None) -> list[StageRow]:
    """Rows with a folder; given a generation, only those that it makes itself."""
    rows = [row for row in STAGES if row.folder]
    return [row for row in rows if generation in (None, 1) or not (row.only_first or row.once)]


def rows_of(generation: int) -> list[StageRow]:
    """Rows with a folder in a generation, which it makes itself or takes from the one before."""
    return [row for row in STAGES if row.folder and (generation == 1 or not row.once)]


def maker_of(name: str) -> str | None:
    """The stage that makes the input of this name in a fingerprint; None for shards and files."""
    return next((row.upstream[name] for row in STAGES if name in row.upstream), None)


def fields_in_force(entries: Iterable[str], config: object) -> list[str]:
    """The fields of `fingerprint` or `reads` whose condition holds for a configuration."""
    pairs = (entry.partition(" if ") for entry in entries)
    return [name for name, _, condition in pairs if not condition or _holds(condition, config)]


def _holds(condition: str, config: object) -> bool:
    name, equals, expected = condition.partition("=")
    value = attrgetter(name)(config)
    return str(value) == expected if equals else bool(value)


def describe_stages() -> list[str]:
    """The lines of --help: a paragraph per stage, those of stage=all first."""
    of_all = [line for row in STAGES if not row.only_named for line in _describe(row)]
    others = [line for row in STAGES if row.only_named for line in _describe(row)]
    return [
        "Stages of stage=all, in order (stage=teacher,label runs two):",
        *of_all,
        "Stages that run only when named:",
        *others,
    ]


def _describe(row: StageRow) -> list[str]:
    return textwrap.wrap(row.purpose, _HELP_WIDTH, initial_indent=f"    {row.name:11}", subsequent_indent=" " * 15)
