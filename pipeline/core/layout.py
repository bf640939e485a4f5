"""Where a run keeps what: the folders of DESIGN's run directory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data import storage
from data.run_names import CURRENT_NAME, INDEXES, LABELS, SELECTIONS, generation_folder

PREVIOUS_NAME = "previous"  # and the one that was in use before
VERSION = re.compile(r"v([1-9]\d*)")  # of an export


@dataclass(frozen=True)
class Layout:
    """The folders of one generation (1, 2, …) of a run."""

    run_dir: str
    generation: int = 1

    def _of(self, generation: int, name: str) -> str:
        return storage.join(self.run_dir, generation_folder(generation), name)

    @property
    def teacher(self) -> str:
        """The teacher; from the second generation on, the student of the one before."""
        return self._of(1, "teacher") if self.generation == 1 else self._of(self.generation - 1, "student")

    @property
    def labels(self) -> str:
        """The pseudo-labels."""
        return self._of(self.generation, LABELS)

    @property
    def near_duplicates(self) -> str:
        """One folder per set of labels and held-out images: which of the unlabeled images are copies of held-out ones."""
        return self._of(self.generation, "near_duplicates")

    @property
    def selections(self) -> str:
        """One folder per selection, and `current`, which names one."""
        return self._of(self.generation, SELECTIONS)

    @property
    def student(self) -> str:
        """The student."""
        return self._of(self.generation, "student")

    @property
    def evaluation(self) -> str:
        """Accuracies on the test images."""
        return self._of(self.generation, "evaluation")

    @property
    def decision(self) -> str:
        """With generations=auto: whether the student beats its teacher on the validation images."""
        return self._of(self.generation, "decision")

    @property
    def exports(self) -> str:
        """Versions of what was exported, of all generations, and `latest`, which names one."""
        return storage.join(self.run_dir, "exports")

    @property
    def indexes(self) -> str:
        """Indexes of shards that have none beside them."""
        return storage.join(self.run_dir, INDEXES)

    def study(self, name: str) -> str:
        """A study's results: a folder for each row and seed."""
        return storage.join(self.run_dir, "ablate", name)

    def current_selection(self) -> str | None:
        """The folder of the selection that the student trains on, or None before the first."""
        pointer = storage.join(self.selections, CURRENT_NAME)
        return storage.join(self.selections, storage.read_text(pointer).strip()) if storage.exists(pointer) else None


@dataclass(frozen=True)
class Branch(Layout):
    """A run that begins with what other runs made: what is not its own is looked up there, the nearest first.

    Attributes:
        home: the run directory whose indexes of shards it uses.
        sources: run directories of finished runs.
        own: (generation, name) of folders that it makes itself, though a source may have them too.
    """

    home: str = ""
    sources: tuple[str, ...] = ()
    own: frozenset[tuple[int, str]] = frozenset()

    def _of(self, generation: int, name: str) -> str:
        mine = super()._of(generation, name)
        if (generation, name) in self.own:
            return mine
        theirs = (Layout(source)._of(generation, name) for source in self.sources)
        return next((folder for folder in theirs if storage.exists(folder)), mine)

    @property
    def indexes(self) -> str:
        """Those of the run at home: shards are indexed once."""
        return Layout(self.home).indexes
