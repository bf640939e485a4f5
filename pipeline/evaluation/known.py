"""Figures of a model that was evaluated before on the same test images, as an unchanged teacher: it is not evaluated again.

They are looked for in this generation's earlier evaluations, in those of the generation before, whose student teaches this one, and in
those of the run whose labels this run takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data import storage
from data.json_files import read_json
from pipeline.core.committed_files import read_output_table
from pipeline.core.layout import Layout
from pipeline.core.stage import Fingerprint, config_differences, done_record

PREDICTIONS_NAME = "predictions.parquet"
ROBUSTNESS_FOLDER = "robustness"
_REMEDY = "restore it, or remove the folder: the model is then evaluated again"
_ROBUSTNESS = "evaluate.robustness_images"


@dataclass(frozen=True)
class Evaluated:
    """A model's results in the folder of another evaluation.

    Attributes:
        role: of the model there.
        record: done-record of that evaluation.
        is_as_robust: whether as many corrupted images were measured as now.
    """

    folder: str
    role: str
    record: Mapping[str, Any]
    is_as_robust: bool

    def figures(self) -> dict[str, Any]:
        """Figures on the clean test images."""
        return {name: value for name, value in self.record["summary"][self.role].items() if name != "robustness"}

    def predictions(self) -> dict[str, np.ndarray]:
        """Predicted `label`, int64, and `confidence`, float32, (N,) each. Raises DataError for a damaged file."""
        names = [f"{self.role}_{name}" for name in ("label", "confidence")]
        table = read_output_table(self.folder, PREDICTIONS_NAME, dict(self.record), _REMEDY, names)
        return {name.removeprefix(f"{self.role}_"): table.column(name).to_numpy() for name in names}

    def wrong_by_part(self) -> list[list[int]] | None:
        """Wrong answers under corruption: of each part, one number per condition; None if other images were measured."""
        names = sorted(name for name in self.record["outputs"] if name.startswith(f"{ROBUSTNESS_FOLDER}/"))
        if not (self.is_as_robust and names):
            return None
        return [read_json(storage.join(self.folder, name), _REMEDY)[self.role] for name in names]


def find_evaluated(layout: Layout, expected: Fingerprint) -> dict[str, Evaluated]:
    """Role → results of the same weights on the same test images, measured with the same settings."""
    found: dict[str, Evaluated] = {}
    for folder, record in _evaluations(layout):
        there = record["fingerprint"]
        changed = set(config_differences(there["config"], expected.config))
        if changed - {_ROBUSTNESS} or there["inputs"].get("test") != expected.inputs["test"]:
            continue
        for role in expected.inputs.keys() - {"test"}:
            same = [name for name in record["summary"] if there["inputs"].get(name) == expected.inputs[role]]
            if same and (role not in found or not changed):
                found[role] = Evaluated(folder, same[0], record, not changed)
    return found


def _evaluations(layout: Layout) -> Iterator[tuple[str, dict[str, Any]]]:
    """Folders and done-records of finished evaluations."""
    layouts = [layout]
    if layout.generation > 1:
        layouts.append(replace(layout, generation=layout.generation - 1))
    if layout.labels_from:
        layouts.append(Layout(layout.labels_from, 1))
    for each in layouts:
        parent, _, name = each.evaluation.rpartition("/")
        entries = [entry for entry in storage.list_names(parent) if entry == name or entry.startswith(f"{name}.old-")]
        for folder in (storage.join(parent, entry) for entry in sorted(entries)):
            if (record := done_record(folder)) is not None:
                yield folder, record
