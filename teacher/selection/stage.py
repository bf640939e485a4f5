"""stage=select: choose pseudo-labels by confidence, balanced over the classes.

Images are looked at once, to find near-duplicates of held-out ones; another selection touches none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.labels.label_files import LabeledShard, read_labels_manifest
from pipeline.core.layout import CURRENT_NAME, PREVIOUS_NAME, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, StageError, done_record, open_stage, require_done
from pipeline.upstream.stage_inputs import keeps_images, require_labels
from teacher.diff import as_json, compare, print_changes, side
from teacher.near_duplicates.stage import LISTING_NAME, Searched, find_near_duplicates, read_listing, recorded
from teacher.selection.copies import write_all_copies
from teacher.selection.find_hash_groups import find_crowds
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.precision import precision_json
from teacher.selection.processes import threads_or_processes
from teacher.selection.reuse import keep_images, kept_before, kept_json
from teacher.selection.rule import make_rule, print_precision, read_held_out
from teacher.selection.select import select_shards
from teacher.selection.selection_file import selection_json
from teacher.selection.threads import Progress

SELECTION_NAME = "selection.json"
_THREADS = 2


def select(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run the stage; returns its done-record. Each setting has a folder of its own, and `current` names the last one chosen.

    Raises:
        StageError: labels are missing or of another teacher, or nothing is left to train on.
        DataError: data.exclude or data.held_out_hashes name files that are missing or cannot be used.
    """
    labels = require_labels(config, layout)
    read_keys(config.data.exclude)  # a wrong path is told before the search, not after
    searched = find_near_duplicates(config, layout, labels, force, _progress())
    expected = _fingerprint(config, layout, labels, searched)
    digest = expected.digest()
    stage = open_stage(storage.join(layout.selections, digest), "select", expected, force)
    if not stage.is_done:
        _select(config, layout, labels, searched, stage)
    _make_current(layout, digest, labels["digest"])
    record = require_done(stage.folder, "select")
    _print_near_duplicates(layout.run_dir, record["summary"])
    return record


def _make_current(layout: Layout, digest: str, labels_digest: str) -> None:
    """Have `current` name this selection, `previous` the one before; say what changed, if that was of the same labels."""
    storage.remove_temporary(layout.selections)  # of a process that was killed as it wrote `current`
    before = layout.current_selection()
    changed = before is not None and storage.base_name(before) != digest
    if before is not None and changed:  # first, so that a crash in between leaves no older one to compare with
        storage.write_text(storage.join(layout.selections, PREVIOUS_NAME), storage.base_name(before) + "\n")
    storage.write_text(storage.join(layout.selections, CURRENT_NAME), digest + "\n")
    if before is None or not changed:
        return
    record = done_record(before)
    if record is not None and record["fingerprint"]["inputs"]["labels"] == labels_digest:
        number = str(layout.generation)
        one, two = (side({number: layout}, f"{number}/{name}") for name in (storage.base_name(before), digest))
        print_changes(as_json(one, two, compare(one, two)))


def fingerprint(config: Config, layout: Layout, labels: Mapping[str, Any]) -> Fingerprint:
    """What a selection depends on: its settings, the labels (their done-record) and what is excluded.

    Before near-duplicates were searched for, this is the fingerprint of no selection. Raises DataError as `select`.
    """
    return _fingerprint(config, layout, labels, recorded(config, layout, labels))


def _fingerprint(config: Config, layout: Layout, labels: Mapping[str, Any], searched: Searched | None) -> Fingerprint:
    missing = "not searched yet" if config.data.held_out_hashes else "none"
    inputs = {"labels": labels["digest"], "near_duplicates": searched.record["digest"] if searched else missing}
    if keeps_images(config, layout):
        inputs["kept"] = kept_before(layout)[1]
    return Fingerprint(config.stage_fields("select"), inputs | exclude_inputs(config.data.exclude))


def _select(config: Config, layout: Layout, labels: Mapping[str, Any], searched: Searched | None, stage: Stage) -> None:
    entries = read_labels_manifest(layout.labels)
    shards = list(entries)
    exclusions = Exclusions(read_listing(searched) if searched else {}, read_keys(config.data.exclude))
    choose = _keep if keeps_images(config, layout) else _choose
    content = choose(config, layout, labels["summary"], entries, exclusions, stage)
    print_precision(content["precision"])
    storage.write_text(stage.path(SELECTION_NAME), json.dumps(content, indent=1) + "\n")
    outputs = [SELECTION_NAME, *(f"{shard}.parquet" for shard in shards)]
    chosen = {**content["totals"], "reasons": content["reasons"], "empty_classes": content["empty_classes"]}
    if searched:
        parts = storage.base_name(layout.near_duplicates), storage.base_name(searched.folder), LISTING_NAME
        listing = storage.join(f"gen-{layout.generation}", *parts)
        chosen["near_duplicates"] = searched.record["summary"] | {"listing": listing}
    stage.commit(outputs, chosen)


def _choose(
    config: Config,
    layout: Layout,
    labels: Mapping[str, Any],
    entries: Mapping[str, LabeledShard],
    exclusions: Exclusions,
    stage: Stage,
) -> dict[str, Any]:
    """Choose by confidence; `labels` is their summary. Returns what selection.json holds."""
    shards = list(entries)
    held_out, least = read_held_out(layout), config.select.confidence_threshold
    rule = make_rule(config.select, labels["num_classes"], held_out)
    exclusions = _with_crowds(config, LabelSource(layout.labels, rule, exclusions, entries))
    with _workers(config.ray_address, len(shards)) as workers:
        selection = select_shards(layout.labels, shards, rule, exclusions, entries=entries, **workers)
        counts = write_all_copies(selection, layout.labels, shards, stage.folder, entries=entries, **workers)
    content = selection_json(selection, counts, labels["class_names"])
    if content["totals"]["kept"] == 0:
        why = ", ".join(
            f"{number:,} {reason.replace('_', ' ')}" for reason, number in content["reasons"].items() if number
        )
        raise StageError(
            f"{layout.labels}: of {content['totals']['rows']:,} labels none is kept ({why}; thresholds from "
            f"{rule.thresholds.min():.4g}); lower select.confidence_threshold or target_precision, or look at the teacher"
        )
    return content | {"precision": precision_json(held_out, rule.thresholds, config.select.target_precision, least)}


def _keep(
    config: Config,
    layout: Layout,
    labels: Mapping[str, Any],
    entries: Mapping[str, LabeledShard],
    exclusions: Exclusions,
    stage: Stage,
) -> dict[str, Any]:
    """As `_choose`, but the images are those of the generation before."""
    num_classes, (kept_from, _) = labels["num_classes"], kept_before(layout)
    with _workers(config.ray_address, len(entries)) as workers:
        counts, classes = keep_images(layout, kept_from, entries, num_classes, exclusions, stage.folder, **workers)
    content = kept_json(counts, classes, kept_from, labels["class_names"], exclusions)
    if content["totals"]["kept"] == 0:
        raise StageError(
            f"{layout.labels}: none of the images of the generation before is left; select.keep_images=false"
        )
    return content | {"precision": precision_json(read_held_out(layout), np.zeros(num_classes, np.float32), None, 0.0)}


@contextmanager
def _workers(ray_address: str | None, num_shards: int) -> Iterator[dict[str, Any]]:
    """Who does the work: threads here, processes where shards are many, or as many tasks as a cluster has CPUs."""
    if ray_address is not None:  # Ray is imported where there is a cluster: that takes longer than most selections
        from pipeline.core.ray_runtime import num_cpus, start_ray
        from teacher.selection.ray_tasks import in_ray_tasks

        start_ray(ray_address)
        yield {"executor": in_ray_tasks, "num_workers": num_cpus(), "progress": _progress()}
        return
    with threads_or_processes(num_shards) as (executor, number):
        yield {"executor": executor, "num_workers": number, "progress": _progress()}


def _with_crowds(config: Config, source: LabelSource) -> Exclusions:
    most = config.select.max_near_duplicates
    if most is None:
        return source.exclusions
    crowds = find_crowds(source, list(source.entries), most, num_workers=_THREADS, progress=_progress())
    return replace(source.exclusions, crowds=crowds)


def _print_near_duplicates(run_dir: str, summary: Mapping[str, Any]) -> None:
    found = summary.get("near_duplicates")
    if found is None:
        return
    print(
        f"select: {found['near_duplicates']:,} of {found['labels']:,} unlabeled images are near-duplicates of held-out ones "
        f"and left out; they are listed in {storage.join(run_dir, found['listing'])}"
    )
    if found["not_seen"]:
        print(
            f"select: {found['not_seen']:,} images that might be near-duplicates could not be looked at (data.unlabeled); "
            "there, equal hashes count. Where the shards are, stage=select force=true looks"
        )


def _progress() -> Progress:
    """Bars that show on work of more than a few seconds."""
    bars: dict[str, tqdm[Any]] = {}

    def update(doing: str, begun: int, total: int) -> None:
        if doing not in bars:
            bars[doing] = tqdm(total=total, desc=f"select: {doing}", unit="shard", delay=5, leave=False)
        bar = bars[doing]
        bar.update(begun - bar.n)
        if begun == total:
            bar.close()

    return update
