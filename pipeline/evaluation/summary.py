"""RUN/summary.json: the figures of all finished stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from data import storage
from data.labels.label_files import copies_digests, read_copies, read_labels, read_labels_manifest
from data.tables import read_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import done_record
from pipeline.core.timing import read_timing
from pipeline.evaluation.generations import summarize
from pipeline.evaluation.speed_file import read_speed
from pipeline.stages import with_folder

SUMMARY_NAME = "summary.json"


def write_summary(config: Config, layout: Layout) -> dict[str, Any]:
    """Write RUN/summary.json from the finished stages, and return it."""
    summary: dict[str, Any] = {}
    if (evaluation := done_record(layout.evaluation)) is not None:
        summary |= _figures(layout, evaluation)
    if (labels := done_record(layout.labels)) is not None:
        summary["labels"] = {key: labels["summary"][key] for key in ("images", "labels", "quarantined")} | _selected(
            config, layout, labels["digest"]
        )
    if config.generations != 1:
        generations = [Layout(layout.run_dir, number) for number in range(1, layout.generation + 1)]
        summary |= {"generations": found} if (found := summarize(generations)) else {}
    summary["seconds"] = _seconds_by_stage(layout)
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


def _seconds_by_stage(layout: Layout) -> dict[str, float]:
    """Wall-clock seconds of the generation's stages, over all their runs; a later teacher counts as a student."""
    folders = {row.name: layout.folder_of(row.name) for row in with_folder(layout.generation)}
    return {stage: read_timing(folder).seconds for stage, folder in folders.items() if done_record(folder)}


def _selected(config: Config, layout: Layout, labels_digest: str) -> dict[str, Any]:
    """`kept`: the number of selected pseudo-labels; with data.truth also their precision. Empty for a selection of older labels."""
    folder = layout.current_selection()
    record = done_record(folder) if folder else None
    if folder is None or record is None or record["fingerprint"]["inputs"]["labels"] != labels_digest:
        return {}
    figures: dict[str, Any] = {"kept": record["summary"]["kept"]}
    if config.data.truth and storage.exists(config.data.truth):
        figures |= _precision(config.data.truth, layout.labels, folder, copies_digests(record))
    return figures


def _precision(
    truth_url: str, labels_folder: str, selection_folder: str, copies_of: Mapping[str, str]
) -> dict[str, float]:
    """`labels_right` and `kept_right`: precision, in 0 to 1, of all and of the selected pseudo-labels whose truth is known."""
    remedy = "data.truth must be Parquet of (shard, ordinal, label), or null"
    truth = read_table(truth_url, remedy, ["shard", "ordinal", "label"])
    shard_of, ordinals, answers = (truth.column(name) for name in ("shard", "ordinal", "label"))
    counts = np.zeros(4, np.int64)
    for name, entry in read_labels_manifest(labels_folder).items():
        here = pc.equal(shard_of, name)
        known = dict(zip(ordinals.filter(here).to_pylist(), answers.filter(here).to_pylist(), strict=True))
        labels = read_labels(storage.join(labels_folder, f"{name}.parquet"), ["ordinal", "label"], entry)
        copies = read_copies(storage.join(selection_folder, f"{name}.parquet"), copies_of.get(name))
        right_answer = np.array([known.get(ordinal, -1) for ordinal in labels.column("ordinal").to_pylist()], np.int64)
        is_known, is_right = right_answer >= 0, right_answer == labels.column("label").to_numpy()
        is_kept = is_known & (copies > 0)
        counts += [is_known.sum(), is_right.sum(), is_kept.sum(), (is_right & is_kept).sum()]
    num_known, num_right, num_kept, num_kept_right = counts.tolist()
    return {"labels_right": num_right / max(num_known, 1), "kept_right": num_kept_right / max(num_kept, 1)}
