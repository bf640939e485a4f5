"""stage=select: choose pseudo-labels by confidence, balanced over the classes. No image is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data import storage
from data.labels import read_labels, read_manifest
from pipeline.cluster import num_cpus, start_ray
from pipeline.config import Config
from pipeline.layout import CURRENT_NAME, Layout
from pipeline.stage import Fingerprint, StageError, open_stage, require_done
from pipeline.upstream import require_labels
from teacher.cutoffs import SelectRule
from teacher.label_rows import Exclusions
from teacher.ray_tasks import in_ray_tasks
from teacher.select import select_shards
from teacher.selection import write_all_copies
from teacher.selection_file import selection_json
from teacher.threads import Progress, in_threads

SELECTION_NAME = "selection.json"
_THREADS = 2


def select(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run the stage; returns its done-record. Each setting has a folder of its own, and `current` names the last one chosen.

    Raises:
        StageError: labels are missing or of another teacher, or nothing is left to train on.
    """
    labels = require_labels(config, layout)
    expected = fingerprint(config, labels)
    digest = expected.digest()
    stage = open_stage(storage.join(layout.selections, digest), "select", expected, force)
    if not stage.is_done:
        summary = labels["summary"]
        rule = SelectRule(
            num_classes=summary["num_classes"],
            confidence_threshold=config.select.confidence_threshold,
            per_class=config.select.per_class,
            max_copies=config.select.max_copies,
        )
        shards = [entry.name for entry in read_manifest(layout.labels)]
        exclusions = _exclusions(config)
        workers = _workers(config.ray_address)
        selection = select_shards(layout.labels, shards, rule, exclusions, **workers)
        counts = write_all_copies(selection, layout.labels, shards, stage.folder, **workers)
        content = selection_json(selection, counts, summary["class_names"])
        if content["totals"]["kept"] == 0:
            raise StageError(
                f"{layout.labels}: no label has confidence {config.select.confidence_threshold} or more; "
                "lower select.confidence_threshold, or look at the teacher"
            )
        storage.write_text(stage.path(SELECTION_NAME), json.dumps(content, indent=1) + "\n")
        outputs = [SELECTION_NAME, *(f"{shard}.parquet" for shard in shards)]
        stage.commit(
            outputs, {**content["totals"], "reasons": content["reasons"], "empty_classes": content["empty_classes"]}
        )
    storage.remove_temporary(layout.selections)  # of a process that was killed as it wrote `current`
    storage.write_text(storage.join(layout.selections, CURRENT_NAME), digest + "\n")
    return require_done(stage.folder, "select")


def fingerprint(config: Config, labels: Mapping[str, Any]) -> Fingerprint:
    """What a selection depends on: its settings, the labels (their done-record) and what is excluded. Raises as `select`."""
    inputs = {"labels": labels["digest"], "exclusions": _exclusions(config).digest()[:16]}
    return Fingerprint(config.stage_fields("select"), inputs)


def _workers(ray_address: str | None) -> dict[str, Any]:
    """Who does the work: threads here, or as many tasks as a cluster has CPUs."""
    if ray_address is None:
        return {"executor": in_threads, "num_workers": _THREADS, "progress": _progress()}
    start_ray(ray_address)
    return {"executor": in_ray_tasks, "num_workers": num_cpus(), "progress": _progress()}


def _exclusions(config: Config) -> Exclusions:
    urls = storage.expand(config.data.held_out_hashes)
    missing = [url for url in urls if not storage.exists(url)]
    if missing:
        raise StageError(f"data.held_out_hashes: {missing[0]} is not there; data.pack writes it beside labeled shards")
    hashes = [_read_hashes(url) for url in urls]
    keys: frozenset[str] = frozenset()
    if config.select.exclude:
        if not storage.exists(config.select.exclude):
            raise StageError(
                f"select.exclude={config.select.exclude}: no such file; expected a text file of keys, one a line"
            )
        keys = frozenset(storage.read_text(config.select.exclude).splitlines())
    return Exclusions(held_out_hashes=np.concatenate([*hashes, np.empty(0, np.uint64)]), keys=keys)


def _read_hashes(url: str) -> np.ndarray:
    try:
        return np.asarray(read_labels(url, ["image_hash"]).column("image_hash").to_numpy())
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise StageError(
            f"data.held_out_hashes: {url}: expected a hashes.parquet with a column image_hash, as data.pack writes it ({reason})"
        ) from error


def _progress() -> Progress:
    """Bars that show on work of more than a few seconds."""
    bars: dict[str, tqdm[Any]] = {}

    def update(doing: str, begun: int, total: int) -> None:
        bar = bars.setdefault(doing, tqdm(total=total, desc=f"select: {doing}", unit="shard", delay=5, leave=False))
        bar.update(begun - bar.n)
        if begun == total:
            bar.close()

    return update
