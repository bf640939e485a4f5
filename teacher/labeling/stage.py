"""stage=label: the teacher labels every unlabeled image once; Ray places shards on labeling actors.

A shard's labels are one file and one commit. After any failure, running the stage again makes the missing files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from data import storage
from data.json_files import read_json
from data.labels.label_files import LABELS_MANIFEST, MANIFEST_REMEDY, QUARANTINE_NAME, VALIDATION_NAME, quarantine_table
from data.labels.label_footers import read_all_quarantined
from data.labels.top_k import MAX_CLASSES
from data.shards.split import Shard, Split, open_split
from data.storage.redact import redacted
from data.tables import write_table
from pipeline.core.devices import call_on_device, require_device
from pipeline.core.layout import Layout
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config, LabelConfig
from pipeline.core.stage import (
    Fingerprint,
    Stage,
    StageError,
    done_record,
    inspect_stage,
    open_stage,
    require_done,
    with_recorded_device,
)
from pipeline.inference.ensemble import ensemble_digest
from pipeline.inference.stage_weights import read_info
from pipeline.models.weights import WeightsInfo
from teacher.label_quality import judge_labels, print_quality
from teacher.labeling.actor import Labeler
from teacher.labeling.corpus import check_shards, count_unusable, known_problems, report_oddities, too_many_unusable
from teacher.labeling.finished_shards import JOURNAL_NAME, Journal
from teacher.labeling.label_calibration import CALIBRATION, calibration_input, can_calibrate
from teacher.labeling.pool import PoolOptions, ShardPool
from teacher.labeling.progress import LabelProgress, ProgressDisplay
from teacher.labeling.prometheus import Gauges
from teacher.labeling.teacher_check import LABELS_TEMPERATURE, OF_LABELS_ALONE, check_teacher
from teacher.validation_labels import ValidationLabels

_SKIPPED = {"skipped": "no validation images"}
_DETAILS = re.compile(r"\d+|b?'[^']*'|b?\"[^\"]*\"")  # the parts of a reason that differ from image to image


def label(config: Config, layout: Layout, force: bool = False, accept_chance: bool | None = None) -> dict[str, Any]:
    """Run or continue the stage; return its done-record.

    Args:
        accept_chance: accept a teacher whose labels are no better than chance; defaults to `force`.

    Raises:
        StageError: the teacher is missing, no better than chance or worse than expected (the accuracy in its weights, or
            `teacher.expected_top1`); its classes are not the labeled set's; too many images cannot be used; workers cannot be
            started or are lost at one shard repeatedly.
        StageRefusedError: as `open_stage`.
        UsageError: the device does not exist.
        DataError: shards are missing or damaged.
        WorkerError: an error in the code that a worker ran.
    """
    teacher = require_done(layout.teacher, layout.teacher_stage)
    if not config.data.unlabeled:
        raise StageError(
            "data.unlabeled is empty; give the shards to label, as in data.unlabeled=['/data/unlabeled-{000000..012999}.tar']"
        )
    expected = with_recorded_device(
        fingerprint(config, teacher["digest"], calibration_input(config, layout, force)), layout.labels
    )
    corpus = open_split(config.data.unlabeled, layout.indexes)
    is_done, journal = _inspect(layout.labels, expected, corpus, force)
    todo = [shard for shard in corpus.shards if shard.name not in journal.shards]
    if is_done and not todo and require_done(layout.labels, "label")["summary"]["corpus"] == corpus.digest():
        open_stage(layout.labels, "label", expected)
        return require_done(layout.labels, "label")
    accept_chance = force if accept_chance is None else accept_chance
    # before `open_stage`: a refusal must leave a finished output as it is
    calibrates = CALIBRATION in expected.inputs
    info, validation = _check_before_changes(config, layout, corpus, journal, accept_chance, calibrates)
    stage = open_stage(layout.labels, "label", expected, force)
    journal.read_unread()
    todo = [shard for shard in corpus.shards if shard.name not in journal.shards]
    if stage.is_done:
        new = f"{len(todo)} of {len(corpus.shards)} shards are new, changed or without labels"
        stage.reopen(new if todo else "data.unlabeled has fewer shards than before")
    elif journal.shards:
        print(f"label: {len(journal.shards):,} of {len(corpus.shards):,} shards are labeled already")
    if journal.shards and not calibrates and can_calibrate(config):
        print(
            "label: the labels that are there have only the temperature of the teacher on one view, as in earlier versions; new ones "
            "get the same (stage=label force=true calibrates all of them)"
        )
    if validation is not None:
        storage.write_bytes(stage.path(VALIDATION_NAME), validation)
    if "accepted" in (journal.teacher_check or {}):
        journal.write()  # so that after a kill the run continues without asking again
    _check_quarantined(config.label, stage, journal, corpus)
    report_oddities(corpus)
    if todo:
        _label_shards(config, layout, stage, corpus, todo, journal)
    return _commit(stage, info, corpus, journal)


def _inspect(folder: str, expected: Fingerprint, corpus: Split, force: bool) -> tuple[bool, Journal]:
    """Whether the stage is done, and which shards have labels. Changes nothing. Raises StageRefusedError as `open_stage`."""
    if force:
        return False, Journal(folder)  # the old output is moved aside
    state, _ = inspect_stage(folder, "label", expected)
    return state == "done", Journal.open(folder, corpus, expected.digest())


def _check_before_changes(
    config: Config, layout: Layout, corpus: Split, journal: Journal, accept_chance: bool, calibrates: bool
) -> tuple[WeightsInfo, bytes | None]:
    """Make all checks that can refuse the run, before anything is written; the teacher's goes into `journal`.

    Returns:
        The teacher's info, and the content of VALIDATION_NAME if it has to be written.

    Raises:
        StageError, UsageError: as `label`.
    """
    require_device(config.resolved_device(), config.ray_address)
    check_shards(corpus, config.label)
    info = read_info(layout.teacher)
    if info.num_classes > MAX_CLASSES:
        raise StageError(f"{info.num_classes} classes are more than the label files' {MAX_CLASSES}")
    if done_record(layout.labels) and (too_many := _too_many_unusable(config.label, layout.labels, journal, corpus)):
        raise StageError(too_many)
    known = journal.teacher_check
    is_there = storage.exists(storage.join(layout.labels, VALIDATION_NAME))
    lacks_temperature = calibrates and LABELS_TEMPERATURE not in (known or {})
    if known is not None and is_there and not lacks_temperature and not _asks_for_more(config, known):
        return info, None
    accepted = accept_chance or "accepted" in (known or _committed_check(layout.labels) or {})
    device, address = config.resolved_device(), config.ray_address
    found, table = call_on_device(device, address, _check, config, layout, info, accepted, calibrates)
    journal.teacher_check = found or _SKIPPED
    return info, table


def _check(
    config: Config, layout: Layout, info: WeightsInfo, accepted: bool, calibrates: bool
) -> tuple[dict[str, Any] | None, bytes | None]:
    """What `check_teacher` returns, and what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"{folder}/{VALIDATION_NAME}"
        found = check_teacher(config, layout, info, url, accepted, calibrates)
        return found, storage.read_bytes(url) if storage.exists(url) else None


def fingerprint(config: Config, teacher_digest: str, calibration: str | None = None) -> Fingerprint:
    """The fingerprint of labels. It does not cover the corpus, which may grow: the manifest identifies each shard.

    Args:
        calibration: see `calibration_input`.
    """
    inputs = {"teacher": teacher_digest} | ({CALIBRATION: calibration} if calibration else {})
    if config.teacher.ensemble:
        inputs["ensemble"] = ensemble_digest(config.teacher.ensemble)
    return Fingerprint(config.stage_fields("label"), inputs)


def _asks_for_more(config: Config, known: Mapping[str, Any]) -> bool:
    """Whether the configuration asks for a check that `known` lacks: the expected accuracy, or validation images."""
    expects = config.teacher.expected_top1 is not None and "expected_top1" not in known
    return expects or ("skipped" in known and bool(config.data.validation))


def _committed_check(folder: str) -> dict[str, Any] | None:
    """The teacher's check of finished labels; None if there are none, or of an earlier version."""
    if not storage.exists(url := storage.join(folder, LABELS_MANIFEST)):
        return None
    check: dict[str, Any] | None = read_json(url, MANIFEST_REMEDY).get("teacher_check")
    return check


def _label_shards(
    config: Config, layout: Layout, stage: Stage, corpus: Split, todo: Sequence[Shard], journal: Journal
) -> None:
    """Label the shards `todo`; add each to the journal once it is committed."""
    start_ray(config.ray_address)
    temperature = (journal.teacher_check or {}).get(LABELS_TEMPERATURE, 1.0)
    pool = _make_pool(config, layout, stage, todo, temperature)
    done = corpus.num_samples - sum(shard.num_samples for shard in todo)
    gauges = Gauges(redacted(stage.folder))
    try:
        with ProgressDisplay(stage.folder, corpus.num_samples, done) as display:
            for result in pool.run():
                if result is not None:
                    done += result.rows + result.quarantined
                    journal.add(result)
                    _check_quarantined(config.label, stage, journal, corpus)
                progress = _progress(pool, display, corpus, journal, done)
                display.show(progress)
                gauges.set(progress)
    finally:
        with suppress(OSError, storage.StorageError):  # a cache: a failed write must not hide what stopped the stage
            journal.write()
    _print_times(pool)


def _make_pool(config: Config, layout: Layout, stage: Stage, todo: Sequence[Shard], temperature: float) -> ShardPool:
    device = config.resolved_device()
    options = _pool_options(config.label, device)
    num_cpus, num_gpus = options.resources["CPU"], options.resources.get("GPU", 0)
    make = Labeler.options(num_cpus=num_cpus, num_gpus=num_gpus).remote  # type: ignore[attr-defined]
    teachers, made_by = [layout.teacher, *config.teacher.ensemble], stage.fingerprint.digest()
    urls = [stage.path(f"{shard.name}.parquet") for shard in todo]
    return ShardPool(lambda: make(teachers, config.label, device, made_by, temperature), options, todo, urls)


def _pool_options(config: LabelConfig, device: str) -> PoolOptions:
    min_workers, max_workers = config.worker_range()
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": config.gpus_per_worker} if device == "cuda" else {})
    return PoolOptions(min_workers, max_workers, resources, config.stall_timeout_s, config.start_timeout_s)


def _progress(
    pool: ShardPool, display: ProgressDisplay, corpus: Split, journal: Journal, committed: int
) -> LabelProgress:
    images = committed + pool.images_in_flight
    rate = display.rate(images, pool.num_ready)
    return LabelProgress(
        images_done=images,
        images_total=corpus.num_samples,
        shards_done=len(journal.shards),
        shards_total=len(corpus.shards),
        quarantined=sum(entry.quarantined for entry in journal.shards.values()),
        workers=pool.num_ready,
        images_per_s=round(rate, 1),
        eta_s=round((corpus.num_samples - images) / rate) if rate else None,
        seconds={part: round(seconds, 1) for part, seconds in pool.seconds().items()},
    )


def _print_times(pool: ShardPool) -> None:
    parts = ", ".join(f"{part} {seconds:,.1f}" for part, seconds in pool.seconds().items())
    print(
        f"label: seconds of all workers' threads: {parts}" + f"; {pool.replaced} workers replaced" * bool(pool.replaced)
    )


def _check_quarantined(config: LabelConfig, stage: Stage, journal: Journal, corpus: Split) -> None:
    """Stop once more images are quarantined than label.max_quarantined allows for the corpus; write the quarantine table first."""
    if too_many := _too_many_unusable(config, stage.folder, journal, corpus):
        known = [row for shard in corpus.flawed if shard.name not in journal.shards for row in known_problems(shard)]
        labeled = read_all_quarantined(stage.folder, journal.shards.values())
        table = pa.concat_tables([labeled, quarantine_table(known)])
        write_table(stage.path(QUARANTINE_NAME), table)
        raise StageError(too_many)


def _too_many_unusable(config: LabelConfig, folder: str, journal: Journal, corpus: Split) -> str:
    """The error message if the limit is exceeded; else empty."""
    bad = count_unusable(corpus, {entry.name: entry.quarantined for entry in journal.shards.values()})
    if bad <= config.max_quarantined * corpus.num_samples:
        return ""
    return too_many_unusable(bad, corpus, config, f"{storage.join(folder, QUARANTINE_NAME)} names each and says why")


def _commit(stage: Stage, info: WeightsInfo, corpus: Split, journal: Journal) -> dict[str, Any]:
    storage.remove_temporary(stage.folder)  # left by workers that died while others went on
    shards = [journal.shards[shard.name] for shard in corpus.shards]
    quarantined = read_all_quarantined(stage.folder, shards)
    manifest = _manifest(stage, info, corpus, journal)
    write_table(stage.path(QUARANTINE_NAME), quarantined)
    storage.write_text(stage.path(LABELS_MANIFEST), json.dumps(manifest, indent=1) + "\n")
    summary: dict[str, Any] = {
        "corpus": corpus.digest(),
        "images": corpus.num_samples,
        "labels": sum(entry.rows for entry in shards),
        "quarantined": dict(Counter(_DETAILS.sub("…", reason) for reason in quarantined.column("reason").to_pylist())),
        "odd_keys": sum(manifest["odd_keys"].values()),
        "ignored_images": sum(manifest["ignored_images"].values()),
        "class_names": info.class_names,
        "num_classes": info.num_classes,
    } | {name: value for name, value in (journal.teacher_check or {}).items() if name in OF_LABELS_ALONE}
    if summary["images"] != summary["labels"] + quarantined.num_rows:
        raise StageError(
            f"{stage.folder}: expected {summary['images']} images but got {summary['labels']} labels and {quarantined.num_rows} "
            "quarantined"
        )
    storage.remove(stage.path(JOURNAL_NAME))  # before the done-marker: nobody would remove it later
    stage.commit([LABELS_MANIFEST, QUARANTINE_NAME, VALIDATION_NAME], summary)
    _print_summary(summary)
    print_quality("label", judge_labels(ValidationLabels.read(stage.folder), summary))
    return require_done(stage.folder, "label")


def _manifest(stage: Stage, info: WeightsInfo, corpus: Split, journal: Journal) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "generation": info.generation + 1,
        "class_names": info.class_names,
        "num_classes": info.num_classes,
        "temperature": info.temperature,
        "teacher": {
            "model": info.model,
            "digest": stage.fingerprint.inputs["teacher"],
            "image_size": info.image_size,
            "ema": True,
        },
        "teacher_check": journal.teacher_check,
        "shards": [asdict(journal.shards[shard.name]) for shard in corpus.shards],
        "odd_keys": {shard.name: shard.odd_keys for shard in corpus.shards if shard.odd_keys},
        "ignored_images": {shard.name: shard.findings.ignored for shard in corpus.flawed if shard.findings.ignored},
    }


def _print_summary(summary: dict[str, Any]) -> None:
    reasons = "".join(
        f"\n  {number:,} × {reason}" for reason, number in Counter(summary["quarantined"]).most_common(10)
    )
    bad = sum(summary["quarantined"].values())
    ignored = f", {summary['ignored_images']:,} more beside them not labeled" if summary["ignored_images"] else ""
    print(f"label: {summary['images']:,} images, {summary['labels']:,} labels, {bad:,} quarantined{ignored}{reasons}")
