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
from pipeline.config import Config, SelectConfig
from pipeline.layout import CURRENT_NAME, PREVIOUS_NAME, Layout
from pipeline.stage import Fingerprint, StageError, done_record, open_stage, require_done
from pipeline.upstream import require_labels
from teacher.check import VALIDATION_NAME
from teacher.cutoffs import SelectRule
from teacher.diff import as_json, compare, print_changes, side
from teacher.label_rows import Exclusions
from teacher.precision import HeldOut, choose_thresholds, precision_json
from teacher.select import select_shards
from teacher.selection import write_all_copies
from teacher.selection_file import selection_json
from teacher.threads import Progress

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
        held_out = _held_out(layout)
        rule = _rule(config.select, summary["num_classes"], held_out)
        shards = [entry.name for entry in read_manifest(layout.labels)]
        exclusions = _exclusions(config)
        selection = select_shards(layout.labels, shards, rule, exclusions, num_workers=_THREADS, progress=_progress())
        counts = write_all_copies(selection, layout.labels, shards, stage.folder, num_workers=_THREADS)
        content = selection_json(selection, counts, summary["class_names"])
        if content["totals"]["kept"] == 0:
            raise StageError(
                f"{layout.labels}: no label has confidence {rule.thresholds.min():.4g} or more; "
                "lower select.confidence_threshold (or target_precision), or look at the teacher"
            )
        content["precision"] = precision_json(
            held_out, rule.thresholds, config.select.target_precision, config.select.confidence_threshold
        )
        _print_precision(content["precision"])
        storage.write_text(stage.path(SELECTION_NAME), json.dumps(content, indent=1) + "\n")
        outputs = [SELECTION_NAME, *(f"{shard}.parquet" for shard in shards)]
        stage.commit(
            outputs, {**content["totals"], "reasons": content["reasons"], "empty_classes": content["empty_classes"]}
        )
    _make_current(layout, digest, labels["digest"])
    return require_done(stage.folder, "select")


def _make_current(layout: Layout, digest: str, labels_digest: str) -> None:
    """Have `current` name this selection, `previous` the one before; say what changed, if that was of the same labels."""
    storage.remove_temporary(layout.selections)  # of a process that was killed as it wrote `current`
    before = layout.current_selection()
    storage.write_text(storage.join(layout.selections, CURRENT_NAME), digest + "\n")
    if before is None or storage.base_name(before) == digest:
        return
    storage.write_text(storage.join(layout.selections, PREVIOUS_NAME), storage.base_name(before) + "\n")
    record = done_record(before)
    if record is not None and record["fingerprint"]["inputs"]["labels"] == labels_digest:
        number = str(layout.generation)
        one, two = (side({number: layout}, f"{number}/{name}") for name in (storage.base_name(before), digest))
        print_changes(as_json(one, two, compare(one, two)))


def fingerprint(config: Config, labels: Mapping[str, Any]) -> Fingerprint:
    """What a selection depends on: its settings, the labels (their done-record) and what is excluded. Raises as `select`."""
    inputs = {"labels": labels["digest"], "exclusions": _exclusions(config).digest()[:16]}
    return Fingerprint(config.stage_fields("select"), inputs)


def _held_out(layout: Layout) -> HeldOut:
    url = storage.join(layout.labels, VALIDATION_NAME)
    if not storage.exists(url):  # labels of an earlier version
        return HeldOut(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))
    return HeldOut.from_table(read_labels(url))


def _rule(config: SelectConfig, num_classes: int, held_out: HeldOut) -> SelectRule:
    least, target = config.confidence_threshold, config.target_precision
    thresholds: tuple[float, ...] = ()
    if target is not None:
        thresholds = tuple(choose_thresholds(held_out, target, least, num_classes, config.precision_by_class).tolist())
        least = min(thresholds)
    return SelectRule(
        num_classes, least, config.per_class, config.max_copies, thresholds if len(set(thresholds)) > 1 else ()
    )


def _print_precision(found: dict[str, Any] | None) -> None:
    """What was promised and what the check of it found; silent without a promise."""
    if found is None or found["target"] is None:
        return
    thresholds = [entry["threshold"] for entry in found["classes"]]
    low, high, chosen, checked = min(thresholds), max(thresholds), found["chosen_on"], found["checked_on"]
    interval = (
        f": {checked['precision']:.1%} ({checked['low']:.1%} to {checked['high']:.1%})" if checked["images"] else ""
    )
    print(
        f"select: target_precision={found['target']}: threshold {low:.4f}{f' to {high:.4f}' * (low < high)}, chosen on half of the "
        f"validation images ({chosen['right']} of {chosen['images']} above it are right); of the other half {checked['right']} of "
        f"{checked['images']}{interval}. Verdict: {found['verdict']}. This goes for images like the labeled ones."
    )


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
