"""The folders of a run directory. A stage's folder is named by its row in `pipeline.stages`; names that `data` reads too are in
`data.run_names`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from data import storage
from data.run_names import CURRENT_NAME, INDEXES, generation_folder
from pipeline.stages import find

SELECTION_NAME = "selection.json"  # file that explains a selection
RESULTS_NAME = "results.json"  # file of a study's or of stage=transfer's results
PREVIOUS_NAME = "previous"  # file that names the selection in use before
TAKEN = ("pretrain", "teacher", "label")  # stages of whose output a run with `labels_from` has none of its own
VERSION = re.compile(r"v([1-9]\d*)")  # name of an export


@dataclass(frozen=True)
class Layout:
    """The folders of one generation (1, 2, …) of a run.

    Attributes:
        labels_from: the run whose teacher and labels the first generation takes.
    """

    run_dir: str
    generation: int = 1
    labels_from: str | None = field(default=None, kw_only=True)

    def _of(self, generation: int, name: str) -> str:
        return storage.join(self.run_dir, generation_folder(generation), name)

    def folder_of(self, stage: str) -> str:
        """The folder of a stage's output; of `select`, the current selection, or before the first one the folder of all."""
        row = find(stage)
        if self.labels_from and self.takes(stage):
            return Layout(self.labels_from, self.generation).folder_of(stage)
        if row.once:
            return storage.join(self.run_dir, row.folder)
        if row.only_first and self.generation > 1:
            return self._of(self.generation - 1, find("student").folder)
        if stage == "select":
            return self.current_selection() or self.selections
        return self._of(self.generation, row.folder)

    def takes(self, stage: str) -> bool:
        """Whether a stage's output is that of the run `labels_from`."""
        return bool(self.labels_from) and stage in TAKEN and (self.generation == 1 or find(stage).once)

    @property
    def pretrain(self) -> str:
        """The pretraining's weights and records, one for all generations."""
        return self.folder_of("pretrain")

    @property
    def teacher_stage(self) -> str:
        """The stage that made the teacher: from the second generation on, it is the student of the one before."""
        return "teacher" if self.generation == 1 else "student"

    @property
    def teacher(self) -> str:
        """The teacher's weights and records."""
        return self.folder_of("teacher")

    @property
    def models(self) -> dict[str, str]:
        """The folders of the models that a generation is judged by, by role."""
        return {"teacher": self.teacher, "student": self.student}

    @property
    def labels(self) -> str:
        """The pseudo-labels."""
        return self.folder_of("label")

    @property
    def near_duplicates(self) -> str:
        """One folder per set of labels and held-out images: which of the unlabeled images are copies of held-out ones."""
        return self._of(self.generation, "near_duplicates")

    @property
    def selections(self) -> str:
        """One folder per selection, and the file `current`, which names one."""
        return self._of(self.generation, find("select").folder)

    @property
    def student(self) -> str:
        """The student's weights and records."""
        return self.folder_of("student")

    @property
    def evaluation(self) -> str:
        """Accuracies on the test images."""
        return self.folder_of("evaluate")

    @property
    def decision(self) -> str:
        """With generations=auto: whether the student beats its teacher on the validation images."""
        return self._of(self.generation, "decision")

    @property
    def exports(self) -> str:
        """Exported versions of all generations, and the file `latest`, which names one."""
        return storage.join(self.run_dir, "exports")

    @property
    def indexes(self) -> str:
        """Indexes of shards that have none beside them."""
        return storage.join(self.run_dir, INDEXES)

    def study(self, name: str) -> str:
        """A study's results: a folder for each row and seed."""
        return storage.join(self.run_dir, "ablate", name)

    @property
    def transfer(self) -> str:
        """Results on other data sets: a folder for each backbone, set, method and seed."""
        return storage.join(self.run_dir, "transfer")

    def current_selection(self) -> str | None:
        """The folder of the selection that the student trains on, or None before the first."""
        pointer = storage.join(self.selections, CURRENT_NAME)
        return storage.join(self.selections, storage.read_text(pointer).strip()) if storage.exists(pointer) else None


@dataclass(frozen=True)
class Branch(Layout):
    """A run that reuses folders of other runs: a folder that is not its own is the first one found in `sources`.

    Attributes:
        home: the run directory whose indexes of shards it uses.
        sources: run directories of finished runs, nearest first.
        own: (generation, folder name) that it makes itself even where a source has them.
    """

    home: str = ""
    sources: tuple[str, ...] = ()
    own: frozenset[tuple[int, str]] = frozenset()

    def folder_of(self, stage: str) -> str:
        """As for any run; what is made once is that of `home`."""
        return Layout(self.home or self.run_dir).folder_of(stage) if find(stage).once else super().folder_of(stage)

    def _of(self, generation: int, name: str) -> str:
        mine = super()._of(generation, name)
        if (generation, name) in self.own:
            return mine
        theirs = (Layout(source)._of(generation, name) for source in self.sources)
        return next((folder for folder in theirs if storage.exists(folder)), mine)

    @property
    def indexes(self) -> str:
        """Those of `home`, so that shards are indexed once."""
        return Layout(self.home).indexes
