"""stage=select: choose pseudo-labels by confidence, balanced over the classes.

The first selection of some labels searches the images for near-duplicates of held-out ones. Later ones read label files only, unless
`data.held_out_hashes` or `select.copy_correlation` changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from data import storage
from data.labels.exclusions import exclude_inputs, read_keys
from data.labels.label_files import COPIES_REMEDY, read_labels_manifest
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import CURRENT_NAME, PREVIOUS_NAME, SELECTION_NAME, Layout
from pipeline.core.schema import Config
from pipeline.core.stage import Fingerprint, Stage, StageError, done_record, open_stage, require_done
from pipeline.upstream.stage_inputs import keeps_images, require_labels
from teacher.diff import changes, print_changes, side
from teacher.executors import Executor, RayTasks, Threads, progress_bars, threads_or_processes
from teacher.label_quality import judge_kept, print_quality
from teacher.near_duplicates.stage import (
    IN_GREY,
    LISTING_NAME,
    SearchResult,
    find_near_duplicates,
    read_listing,
    recorded,
)
from teacher.selection.copies import write_all_copies
from teacher.selection.hash_groups import find_hash_groups
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.precision import make_rule, precision_json, print_precision
from teacher.selection.quota import quota_sentences
from teacher.selection.quota_search import select_shards
from teacher.selection.reuse import every_row, previous_selection, reuse_images
from teacher.selection.selection_file import reused_json, selection_json
from teacher.validation_labels import ValidationLabels

_NUM_THREADS = 2


def select(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run the stage; return its done-record. Every setting gets a folder of its own; the file `current` names the latest.

    Raises:
        StageError: labels are missing or of another teacher, or no image is selected.
        SelectError: a label file is missing or broken, or select.target_precision cannot be reached.
        DataError: data.exclude or data.held_out_hashes name files that are missing or cannot be used.
    """
    labels = require_labels(config, layout)
    read_keys(config.data.exclude)  # refuse a wrong path before the search, not after
    searched = find_near_duplicates(config, layout, labels, force, progress_bars("select"))
    expected = _fingerprint(config, layout, labels, searched)
    digest = expected.digest()
    stage = open_stage(storage.join(layout.selections, digest), "select", expected, force)
    if not stage.is_done:
        _select(config, layout, labels, searched, stage)
    _make_current(layout, digest, labels["digest"])
    record = require_done(stage.folder, "select")
    _print_near_duplicates(layout.run_dir, record["summary"])
    content = read_output_json(stage.folder, SELECTION_NAME, record, COPIES_REMEDY)
    print_quality("select", judge_kept(ValidationLabels.read(layout.labels), content))
    return record


def _make_current(layout: Layout, digest: str, labels_digest: str) -> None:
    """Point `current` at this selection and `previous` at the one before; print the changes if both have the same labels."""
    storage.remove_temporary(layout.selections)  # left by a process that was killed while it wrote `current`
    before = layout.current_selection()
    changed = before is not None and storage.base_name(before) != digest
    if before is not None and changed:  # first: a crash in between must not leave an older `previous`
        storage.write_text(storage.join(layout.selections, PREVIOUS_NAME), storage.base_name(before) + "\n")
    storage.write_text(storage.join(layout.selections, CURRENT_NAME), digest + "\n")
    if before is None or not changed:
        return
    record = done_record(before)
    if record is not None and record["fingerprint"]["inputs"]["labels"] == labels_digest:
        number = str(layout.generation)
        one, two = (side({number: layout}, f"{number}/{name}") for name in (storage.base_name(before), digest))
        print_changes(changes(one, two))


def fingerprint(config: Config, layout: Layout, labels: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a selection: its settings, the labels (their done-record) and the exclusions.

    Before the search for near-duplicates, it matches no selection.

    Raises:
        DataError: as `select`.
        StageError: as `previous_selection`.
    """
    return _fingerprint(config, layout, labels, recorded(config, layout, labels))


def _fingerprint(
    config: Config, layout: Layout, labels: Mapping[str, Any], searched: SearchResult | None
) -> Fingerprint:
    missing = "not searched yet" if config.data.held_out_hashes else "none"
    inputs = {"labels": labels["digest"], "near_duplicates": searched.record["digest"] if searched else missing}
    if keeps_images(config, layout):
        inputs["kept"] = previous_selection(layout)[1]
    return Fingerprint(config.stage_fields("select"), inputs | exclude_inputs(config.data.exclude))


def _select(
    config: Config, layout: Layout, labels: Mapping[str, Any], searched: SearchResult | None, stage: Stage
) -> None:
    labeled = read_labels_manifest(layout.labels)
    exclusions = Exclusions(read_listing(searched) if searched else {}, read_keys(config.data.exclude))
    source = LabelSource(layout.labels, every_row(labels["summary"]["num_classes"]), exclusions, labeled)
    choose = _reuse if keeps_images(config, layout) else _choose
    content = choose(config, layout, source, labels["summary"]["class_names"], stage.folder)
    print_precision(content["precision"])
    for sentence in quota_sentences(content):
        print(f"select: {sentence}")
    storage.write_text(stage.path(SELECTION_NAME), json.dumps(content, indent=1) + "\n")
    outputs = [SELECTION_NAME, *(f"{shard}.parquet" for shard in labeled)]
    summary = {**content["totals"], "reasons": content["reasons"], "empty_classes": content["empty_classes"]}
    if searched:
        parts = storage.base_name(layout.near_duplicates), storage.base_name(searched.folder), LISTING_NAME
        listing = storage.join(f"gen-{layout.generation}", *parts)
        summary["near_duplicates"] = searched.record["summary"] | {"listing": listing}
    stage.commit(outputs, summary)


def _choose(
    config: Config, layout: Layout, source: LabelSource, class_names: Sequence[str] | None, out_dir: str
) -> dict[str, Any]:
    """Choose by confidence; return the content of selection.json. `source`: its rule is not used."""
    shards, minimum, target = list(source.labeled), config.select.confidence_threshold, config.select.target_precision
    validation = ValidationLabels.read(layout.labels)
    rule = make_rule(config.select, source.rule.num_classes, validation)
    source = _with_hash_groups(config, replace(source, rule=rule))
    with _executor(config.ray_address, layout.labels, len(shards)) as executor:
        selection = select_shards(source, shards, executor)
        counts = write_all_copies(selection, shards, out_dir, executor)
    content = selection_json(selection, counts, class_names)
    if content["totals"]["kept"] == 0:
        reasons = {name.replace("_", " "): number for name, number in content["reasons"].items() if number}
        why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
        raise StageError(
            f"{layout.labels}: none of the {content['totals']['rows']:,} labels is selected ({why}; lowest threshold "
            f"{rule.thresholds.min():.4g}); lower select.confidence_threshold or target_precision, or check the teacher"
        )
    return content | {"precision": precision_json(validation, rule.thresholds, target, minimum)}


def _reuse(
    config: Config, layout: Layout, source: LabelSource, class_names: Sequence[str] | None, out_dir: str
) -> dict[str, Any]:
    """As `_choose`, but take the images of the generation before."""
    reuse_from, _ = previous_selection(layout)
    with _executor(config.ray_address, layout.labels, len(source.labeled)) as executor:
        counts, classes = reuse_images(layout, source, reuse_from, out_dir, executor)
    content = reused_json(reuse_from, source.exclusions, classes, counts, class_names)
    if content["totals"]["kept"] == 0:
        raise StageError(
            f"{layout.labels}: no image of the generation before is left to reuse; set select.keep_images=false"
        )
    precision = precision_json(ValidationLabels.read(layout.labels), source.rule.thresholds, None, 0.0)
    return content | {"precision": precision}


@contextmanager
def _executor(ray_address: str | None, labels_dir: str, num_shards: int) -> Iterator[Executor]:
    """Ray tasks on a cluster, up to one per CPU; here threads, more of them for a store, or processes if there are many shards."""
    if ray_address is not None:  # importing Ray takes longer than most selections
        from pipeline.core.ray_runtime import num_cpus, start_ray

        start_ray(ray_address)
        yield RayTasks(num_cpus(), progress_bars("select"))
        return
    if not storage.is_local(labels_dir):  # threads share its connections
        yield Threads(_num_threads(labels_dir), progress_bars("select"))
        return
    with threads_or_processes(num_shards, progress_bars("select")) as executor:
        yield executor


def _num_threads(labels_dir: str) -> int:
    return _NUM_THREADS if storage.is_local(labels_dir) else storage.PARALLEL_REQUESTS


def _with_hash_groups(config: Config, source: LabelSource) -> LabelSource:
    max_images = config.select.max_near_duplicates
    if max_images is None:
        return source
    threads = Threads(_num_threads(source.labels_dir), progress_bars("select"))
    groups = find_hash_groups(source, list(source.labeled), max_images, threads=threads)
    return replace(source, exclusions=replace(source.exclusions, hash_groups=groups))


def _print_near_duplicates(run_dir: str, summary: Mapping[str, Any]) -> None:
    found = summary.get("near_duplicates")
    if found is None:
        return
    print(
        f"select: {found['near_duplicates']:,} of {found['labels']:,} unlabeled images are near-duplicates of held-out ones "
        f"and left out; listed in {storage.join(run_dir, found['listing'])}"
    )
    if in_grey := found.get(IN_GREY):
        print(
            f"select: {in_grey:,} of them have colours and were compared in grey: data.held_out_hashes has no colours of the held-out "
            "image. Where these images have colours, an earlier version packed them: pack that split again"
        )
    if found["not_seen"]:
        print(
            f"select: {found['not_seen']:,} images that might be near-duplicates could not be read (data.unlabeled); those with the "
            "hash of a held-out image count as near-duplicates. With the shards at hand, stage=select force=true reads them"
        )
