"""Find what each stage of a command would do (nothing, run, continue, start over, refuse) and why, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data import storage
from data.errors import DataError
from data.settings import UsageError
from data.shards.split import Split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import (
    StageError,
    done_record,
    inspect_stage,
    is_begun,
    refuse_other_config,
    require_done,
    with_recorded_device,
)
from pipeline.evaluation.stage import fingerprint as evaluate_fingerprint
from pipeline.evaluation.stage import is_outdated
from pipeline.models.initial_weights import PRETRAIN
from pipeline.stages import find
from pipeline.upstream.labeled_splits import classes_of
from pipeline.upstream.stage_inputs import (
    explain_inputs,
    fingerprint_of,
    require_labeled_corpus,
    require_labels,
    require_selection,
    require_test,
)
from student.train import fingerprint as student_fingerprint
from student.train import require_labeled
from teacher.labeling.corpus import check_corpus
from teacher.labeling.finished_shards import Journal
from teacher.labeling.label_calibration import calibration_input
from teacher.labeling.stage import fingerprint as label_fingerprint
from teacher.pretrain import fingerprint as pretrain_fingerprint
from teacher.selection.stage import fingerprint as select_fingerprint
from teacher.train import fingerprint as teacher_fingerprint

_STATES = {"new": "would run", "continue": "would continue", "done": "done"}
REFUSES = "would refuse"


@dataclass(frozen=True)
class Outlook:
    """What a stage would do.

    Attributes:
        changes: its output will be new or another one, which later stages depend on.
    """

    state: str
    reason: str = ""
    changes: bool = False

    @property
    def works(self) -> bool:
        """True when the stage makes something, so that its digest is not known yet."""
        return self.state not in ("done", REFUSES)


class Forecast:
    """Forecasts the stages of a command in one generation, in order; a forecast depends on those of earlier stages."""

    def __init__(self, config: Config, layout: Layout, splits: Mapping[str, Split], teacher: Outlook | None) -> None:
        """`teacher`: in a later generation, the outlook of the student that will be its teacher, if the command runs that."""
        self._config, self._layout, self._splits = config, layout, splits
        self.seen: dict[str, Outlook] = {"teacher": teacher} if teacher else {}

    def outlook(self, stage: str, forced: bool = False) -> Outlook:
        """The outlook of the next stage; `forced` when force=true would start it over."""
        finders = {
            "pretrain": self._pretrain,
            "teacher": self._teacher,
            "label": self._label,
            "select": self._select,
            "student": self._student,
            "evaluate": self._evaluate,
        }
        try:
            found = finders[stage]() if stage in finders else self._by_row(stage)
            if found.works:
                self._config.require_trainable(stage)
        except (StageError, DataError, UsageError) as refusal:
            found = Outlook(REFUSES, str(refusal))
        if forced:
            found = Outlook("would start over", "force=true moves the output that is there aside", changes=True)
        self.seen[stage] = found
        return found

    def _changing(self, *stages: str) -> list[str]:
        return [stage for stage in stages if stage in self.seen and self.seen[stage].changes]

    def _pretrain(self) -> Outlook:
        labeled, unlabeled = self._splits.get("labeled"), self._splits.get("unlabeled")
        if labeled is None and unlabeled is None:
            raise StageError("data.labeled and data.unlabeled are empty; give shards of images to pretrain on")
        expected = pretrain_fingerprint(self._config, labeled, unlabeled)
        return _of(inspect_stage(self._layout.pretrain, "pretrain", expected), self._layout.pretrain)

    def _teacher(self) -> Outlook:
        if "teacher" in self.seen:
            return self.seen["teacher"]
        if self._layout.generation > 1:
            require_done(self._layout.teacher, "student")
            return Outlook("done")
        if self._config.teacher.init == PRETRAIN and self._changing(PRETRAIN):
            return self._after(PRETRAIN, "teacher", self._layout.teacher)
        labeled, validation = self._splits.get("labeled"), self._splits.get("validation")
        expected = teacher_fingerprint(self._config, labeled, validation)
        classes_of(self._config, labeled or validation)
        return _of(inspect_stage(self._layout.teacher, "teacher", expected), self._layout.teacher)

    def _label(self) -> Outlook:
        found = self._label_by_inputs()
        if found.works and "unlabeled" in self._splits:
            check_corpus(self._splits["unlabeled"], self._config.label)
        return found

    def _label_by_inputs(self) -> Outlook:
        folder = self._layout.labels
        if changing := self._changing("teacher"):
            return self._after(changing[0], "label", folder)
        teacher = require_done(self._layout.teacher, self._layout.teacher_stage)
        calibration = calibration_input(self._config, self._layout)
        expected = with_recorded_device(label_fingerprint(self._config, teacher["digest"], calibration), folder)
        found = _of(inspect_stage(folder, "label", expected, explain_inputs(self._layout)), folder)
        corpus = self._corpus()
        todo = len(corpus.shards) - len(Journal.open(folder, corpus, expected.digest()).shards)
        if found.state != "done":
            reason = found.reason or f"{todo:,} of {len(corpus.shards):,} shards are without labels"
            return replace(found, reason=reason)
        grown = require_done(folder, "label")["summary"]["corpus"] != corpus.digest()
        if todo or grown:  # relabeling lost labels changes nothing
            reason = f"{todo:,} of {len(corpus.shards):,} shards are new, changed or without labels"
            return Outlook("would continue", reason, changes=grown)
        return found

    def _corpus(self) -> Split:
        if "unlabeled" not in self._splits:
            raise StageError("data.unlabeled is empty; give unlabeled shards")
        return self._splits["unlabeled"]

    def _select(self) -> Outlook:
        if self._changing("label"):
            return Outlook("would run", changes=True)
        folder = self._selection_folder()
        expected = select_fingerprint(self._config, self._layout, require_labels(self._config, self._layout))
        state, reason = inspect_stage(folder, "select", expected)
        if state == "done" and folder != self._layout.current_selection():
            reason = "made before; it becomes the current one"
        return Outlook(_STATES[state], reason, changes=state == "new")

    def _selection_folder(self) -> str:
        labels = require_labels(self._config, self._layout)
        digest = select_fingerprint(self._config, self._layout, labels).digest()
        return storage.join(self._layout.selections, digest)

    def _student(self) -> Outlook:
        require_labeled(self._config)
        folder = self._layout.student
        if changing := self._changing("label", "select"):
            return self._after(changing[0], "student", folder)
        labels = require_labels(self._config, self._layout)
        expected = student_fingerprint(
            self._config, self._splits["labeled"], self._splits.get("validation"), labels, self._selection(labels)
        )
        found = _of(inspect_stage(folder, "student", expected, explain_inputs(self._layout)), folder)
        if found.works and self._config.student.unlabeled_ratio:
            require_labeled_corpus(self._corpus(), labels)
        return found

    def _selection(self, labels: Mapping[str, Any]) -> dict[str, Any]:
        """The done-record of the selection that will be current when the student starts."""
        if "select" in self.seen and (record := done_record(self._selection_folder())) is not None:
            return record
        return require_selection(self._config, self._layout, labels)[1]

    def _evaluate(self) -> Outlook:
        require_test(self._config)
        if self._changing("teacher", "student"):
            return Outlook("would run")
        expected = evaluate_fingerprint(self._config, self._layout, self._splits["test"])
        if is_outdated(self._layout, expected):
            return Outlook(
                "would run", "the figures there are of other models, test images or corruptions; they are moved aside"
            )
        return _of(inspect_stage(self._layout.evaluation, "evaluate", expected), self._layout.evaluation)

    def _by_row(self, stage: str) -> Outlook:
        """The outlook of a stage whose fingerprint is given by its row of the table."""
        row, folder = find(stage), self._layout.folder_of(stage)
        if changing := self._changing(*row.upstream.values()):
            return self._after(changing[0], stage, folder)
        expected = fingerprint_of(self._config, self._layout, stage)
        return _of(inspect_stage(folder, stage, expected, explain_inputs(self._layout)), folder)

    def _after(self, earlier: str, stage: str, folder: str) -> Outlook:
        """The outlook of a stage whose inputs an earlier stage of the command will make."""
        refuse_other_config(folder, stage, self._config.stage_fields(stage))
        if not is_begun(folder):
            return Outlook("would run", changes=True)
        return Outlook(
            REFUSES,
            f"{folder} was made from inputs that stage={earlier} will replace; then run stage={stage} force=true",
        )


def _of(found: tuple[str, str], folder: str) -> Outlook:
    return Outlook(_STATES[found[0]], found[1], changes=done_record(folder) is None)
