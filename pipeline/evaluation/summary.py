"""RUN/summary.json, the figures of all finished stages; and speed.json, the speed of teacher and student. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from data import storage
from data.json_files import read_json
from data.labels.selected_labels import SelectedLabels
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from pipeline.core.timing import read_timing
from pipeline.evaluation.generations import summarize
from pipeline.evaluation.truth import Truth, read_truth, true_labels
from pipeline.stages import with_folder

SUMMARY_NAME = "summary.json"
SPEED_NAME = "speed.json"  # beside the figures of stage=evaluate


def write_summary(config: Config, layout: Layout) -> dict[str, Any]:
    """Write RUN/summary.json from the finished stages, and return it."""
    summary: dict[str, Any] = {}
    if (pretraining := done_record(layout.pretrain)) is not None:
        summary["pretrain"] = pretraining["summary"]
    if (evaluation := done_record(layout.evaluation)) is not None:
        summary |= _figures(layout, evaluation)
    if (labels := done_record(layout.labels)) is not None:
        summary["labels"] = {key: labels["summary"][key] for key in ("images", "labels", "quarantined")} | _selected(
            config, layout, labels
        )
    if config.generations != 1:
        generations = [replace(layout, generation=number) for number in range(1, layout.generation + 1)]
        summary |= {"generations": found} if (found := summarize(generations)) else {}
    rows = with_folder(layout.generation)  # a later teacher counts as a student
    folders = {row.name: layout.folder_of(row.name) for row in rows}
    summary["seconds"] = {name: read_timing(url).seconds for name, url in folders.items() if done_record(url)}
    storage.write_text(storage.join(layout.run_dir, SUMMARY_NAME), json.dumps(summary, indent=1) + "\n")
    return summary


def _figures(layout: Layout, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies and speed of the evaluated models, without those that were made again since."""
    figures = {
        role: evaluation["summary"][role]
        for role, folder in layout.models.items()
        if role in evaluation["summary"]
        and (record := done_record(folder)) is not None
        and record["digest"] == evaluation["fingerprint"]["inputs"][role]
    }
    if (speed := read_speed(layout.evaluation)) is None:
        return figures
    models = {role: found for role, found in speed["models"].items() if role in figures}
    return figures | {"speed": speed | {"models": models}}


def _selected(config: Config, layout: Layout, labels: Mapping[str, Any]) -> dict[str, Any]:
    """`kept`: the number of selected pseudo-labels; with data.truth also their precision. Empty for a selection of older labels."""
    folder = layout.current_selection()
    record = done_record(folder) if folder else None
    if folder is None or record is None or record["fingerprint"]["inputs"]["labels"] != labels["digest"]:
        return {}
    figures: dict[str, Any] = {"kept": record["summary"]["kept"]}
    if config.data.truth and storage.exists(config.data.truth):
        truth = read_truth(config.data, labels["summary"].get("class_names"))
        figures |= _precision(truth, SelectedLabels.of(layout.labels, folder, record))
    return figures


def _precision(truth: Truth, selected: SelectedLabels) -> dict[str, float]:
    """`labels_right` and `kept_right`: precision, in 0 to 1, of all and of the selected pseudo-labels whose truth is known."""
    counts = np.zeros(4, np.int64)
    for name in selected.labeled:
        rows, copies = selected.read(name, ["ordinal", "label"])
        answers = true_labels(truth, name, rows.column("ordinal").to_numpy())
        is_known, is_right = answers >= 0, answers == rows.column("label").to_numpy()
        is_kept = is_known & (copies > 0)
        counts += [is_known.sum(), is_right.sum(), is_kept.sum(), (is_right & is_kept).sum()]
    num_known, num_right, num_kept, num_kept_right = counts.tolist()
    return {"labels_right": num_right / max(num_known, 1), "kept_right": num_kept_right / max(num_kept, 1)}


def write_speed(evaluation: str, speed: Mapping[str, Any]) -> None:
    """Write the result of `measure_speed` into the folder of stage=evaluate."""
    storage.write_text(storage.join(evaluation, SPEED_NAME), json.dumps(speed, indent=1) + "\n")


def read_speed(evaluation: str) -> dict[str, Any] | None:
    """Read what `write_speed` wrote; None for an evaluation of an earlier version."""
    url = storage.join(evaluation, SPEED_NAME)
    return read_json(url, "delete it: the report does without", _Speed) if storage.exists(url) else None


class _Speed(BaseModel):
    models: dict[str, dict[str, Any]]
    where: str
    busy: bool = False  # an evaluation of an earlier version does not say
