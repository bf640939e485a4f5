"""stage=label: the teacher labels every unlabeled image once. Ray places shards on labeling actors.

A shard's labels are one file and one commit. Whatever happens, running the stage again makes the files that are not there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import ray
import torch
from tqdm import tqdm

from data import storage
from data.labels import (
    LABELS_MANIFEST,
    MAX_CLASSES,
    QUARANTINE_NAME,
    LabeledShard,
    describe_label_file,
    quarantine_table,
    read_labels,
    read_manifest,
    read_quarantined,
)
from data.manifest import Shard, Split, open_split, write_table
from pipeline.cluster import start_ray
from pipeline.config import Config, LabelConfig
from pipeline.layout import Layout
from pipeline.models.weights import WeightsInfo
from pipeline.stage import Fingerprint, Stage, StageError, open_stage, require_done
from pipeline.training.inference import predict_split, top_k_accuracy
from pipeline.training.published import load_predictor, read_info
from teacher.label_shard import label_shard
from teacher.pool import run_on_actors

_EXAMPLES = 3  # in a message
_DETAILS = re.compile(r"\d+|b?'[^']*'|b?\"[^\"]*\"")  # of a reason: what differs from image to image


def label(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; returns its done-record.

    Raises:
        StageError: the teacher is missing or not as good as its weights say, its classes are not the labeled set's, or too
            many images cannot be used.
    """
    teacher = require_done(layout.teacher, "teacher" if layout.generation == 1 else "student")
    stage = open_stage(layout.labels, "label", fingerprint(config, teacher["digest"]), force)
    corpus = open_split(config.data.unlabeled, layout.indexes)
    finished = {} if stage.state == "new" else _finished_shards(stage, corpus)
    todo = [shard for shard in corpus.shards if shard.name not in finished]
    if stage.is_done:
        record = require_done(stage.folder, "label")
        if record["summary"]["corpus"] == corpus.digest() and not todo:
            return record
        stage.reopen(f"{len(todo)} of {len(corpus.shards)} shards are new, changed or without labels")
    report_odd_keys(corpus)
    info = read_info(layout.teacher)
    if info.num_classes > MAX_CLASSES:
        raise StageError(f"{info.num_classes} classes are more than the label files' {MAX_CLASSES}")
    accuracy = check_teacher(config, layout, info)
    _check_quarantined(config.label, finished.values(), corpus)
    for result in _label_shards(config, layout, stage, corpus, todo):
        finished[result.name] = result
        _check_quarantined(config.label, finished.values(), corpus)
    return _commit(stage, info, accuracy, corpus, finished)


def fingerprint(config: Config, teacher_digest: str) -> Fingerprint:
    """What labels depend on. The corpus may grow: each shard's identity is in the manifest."""
    return Fingerprint(config.stage_fields("label"), {"teacher": teacher_digest})


@ray.remote
class Labeler:
    """A worker: the model, loaded once, and one shard after another."""

    def __init__(self, teacher: str, config: LabelConfig, device: str) -> None:
        torch.set_num_threads(config.threads)
        self._predictor = load_predictor(teacher, device, config.batch_size, config.views)
        self._config = config

    def label(self, shard: Shard, url: str) -> LabeledShard:
        """Label a shard and commit its file."""
        return label_shard(shard, url, self._predictor, self._config.top_k, self._config.decode_threads)


def check_teacher(config: Config, layout: Layout, info: WeightsInfo) -> dict[str, float] | None:
    """Label the validation images and compare with what the weights say of themselves: a pass that runs with the wrong
    weights or preprocessing is found before it costs days.

    Returns:
        Expected and found top-1, or None when there is nothing to compare.

    Raises:
        StageError: the accuracy is lower than expected, or the classes are not the labeled set's.
    """
    if not config.data.validation:
        return None
    split = open_split(config.data.validation, layout.indexes)
    check_class_names(info, split, "data.validation")
    elsewhere = layout.generation == 1 and config.teacher.weights is not None
    # what we measured of weights from elsewhere came through the same preprocessing and would always agree
    expected = config.teacher.expected_top1 if elsewhere else info.validation_top1
    if expected is None:
        return None
    torch.set_num_threads(config.threads)
    logits, labels = predict_split(split, load_predictor(layout.teacher, config.resolved_device()))
    found = top_k_accuracy(logits, labels)[0]
    if found < expected - config.teacher.accuracy_tolerance:
        raise StageError(
            f"{layout.teacher}: top-1 {found:.3f} on data.validation, but {expected:.3f} was expected: wrong weights, classes or "
            "preprocessing (teacher.image_size, crop_pct, mean, std). Mend that, or set teacher.expected_top1"
        )
    return {"expected_top1": expected, "found_top1": found}


def check_class_names(info: WeightsInfo, split: Split, field: str) -> None:
    """Raises StageError, naming the first difference, when a labeled split has other classes than the model."""
    if not info.class_names or not split.class_names:
        return
    for position, (ours, theirs) in enumerate(zip(info.class_names, split.class_names, strict=False)):
        if ours != theirs:
            raise StageError(
                f"class {position} is {ours!r} for the teacher and {theirs!r} in {field}; give both the same order"
            )
    if len(info.class_names) != len(split.class_names):
        raise StageError(f"the teacher has {len(info.class_names)} classes, {field} {len(split.class_names)}")


def report_odd_keys(corpus: Split) -> None:
    """One line about keys that do not tell images apart or could not be written; silent where all are well."""
    odd = [shard for shard in corpus.shards if shard.odd_keys]
    if odd:
        examples = ", ".join(f"{shard.odd_key!r} in {shard.name}.tar" for shard in odd[:_EXAMPLES])
        count = sum(shard.odd_keys for shard in odd)
        print(
            f"label: {count} samples in {len(odd)} shards have keys that occur twice there, name several images or could not be "
            f"written ({examples}); they are labeled by shard and ordinal, several images by the first"
        )


def _finished_shards(stage: Stage, corpus: Split) -> dict[str, LabeledShard]:
    """Shards of the corpus whose label files are there, whole and theirs."""
    files = set(storage.list_names(stage.folder))
    known = {entry.name: entry for entry in read_manifest(stage.folder)} if LABELS_MANIFEST in files else {}

    def describe(shard: Shard) -> LabeledShard | None:
        if f"{shard.name}.parquet" not in files:
            return None
        url, entry = stage.path(f"{shard.name}.parquet"), known.get(shard.name)
        if entry is None or storage.size(url) != entry.bytes:
            entry = describe_label_file(url)
        if entry is None:
            print(f"label: {url} is damaged; its shard is labeled again")
        same = entry and (entry.source_bytes, entry.index_sha256) == (shard.bytes, shard.index_sha256)
        return entry if same else None

    with ThreadPoolExecutor(8) as pool:
        return {entry.name: entry for entry in pool.map(describe, corpus.shards) if entry is not None}


def _label_shards(
    config: Config, layout: Layout, stage: Stage, corpus: Split, todo: Sequence[Shard]
) -> Iterator[LabeledShard]:
    if not todo:
        return
    start_ray(config.ray_address)
    device = config.resolved_device()
    options = {"num_cpus": 1, "num_gpus": 1 if device == "cuda" else 0}
    make = Labeler.options(**options).remote  # type: ignore[attr-defined]
    workers = min(_schedulable(config.label.workers, "GPU" if options["num_gpus"] else "CPU"), len(todo))
    urls = [stage.path(f"{shard.name}.parquet") for shard in todo]
    done = corpus.num_samples - sum(shard.num_samples for shard in todo)
    with tqdm(total=corpus.num_samples, initial=done, desc="label", unit="img", mininterval=1) as bar:
        for result in run_on_actors(lambda: make(layout.teacher, config.label, device), workers, todo, urls):
            bar.update(result.rows + result.quarantined)
            yield result


def _schedulable(wanted: int, resource: str) -> int:
    """As many workers as the cluster has room for: Ray would let the others wait for ever, and their shards with them."""
    room = int(ray.cluster_resources().get(resource, 0))
    if room < 1:
        raise StageError(
            f"Ray has no free {resource} for a labeling worker; give it one (device=cpu, or another ray_address=)"
        )
    if room < wanted:
        print(f"label: {room} workers instead of label.workers={wanted}: Ray has {room} {resource}s")
    return min(wanted, room)


def _check_quarantined(config: LabelConfig, finished: Iterable[LabeledShard], corpus: Split) -> None:
    """Stop a run that is mostly bad: as soon as it is certain, not at the first bad shard."""
    bad = sum(entry.quarantined for entry in finished)
    if bad > config.max_quarantined * corpus.num_samples:
        raise StageError(
            f"{bad} of {corpus.num_samples} images could not be used, more than label.max_quarantined="
            f"{config.max_quarantined}; look at them (the label files' metadata name each), repair the shards or raise the limit"
        )


def _commit(
    stage: Stage,
    info: WeightsInfo,
    accuracy: dict[str, float] | None,
    corpus: Split,
    finished: dict[str, LabeledShard],
) -> dict[str, Any]:
    shards = [finished[shard.name] for shard in corpus.shards]
    quarantined = _quarantine(stage, shards)
    odd_keys = {shard.name: shard.odd_keys for shard in corpus.shards if shard.odd_keys}
    manifest = {
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
        "teacher_check": accuracy or "skipped: no validation images or no expected accuracy",
        "shards": [asdict(entry) for entry in shards],
        "odd_keys": odd_keys,
    }
    write_table(stage.path(QUARANTINE_NAME), quarantined)
    storage.write_text(stage.path(LABELS_MANIFEST), json.dumps(manifest, indent=1) + "\n")
    summary: dict[str, Any] = {
        "corpus": corpus.digest(),
        "images": corpus.num_samples,
        "labels": sum(entry.rows for entry in shards),
        "quarantined": dict(Counter(_DETAILS.sub("…", reason) for reason in quarantined.column("reason").to_pylist())),
        "odd_keys": sum(odd_keys.values()),
        "class_names": info.class_names,
        "num_classes": info.num_classes,
    }
    if summary["images"] != summary["labels"] + quarantined.num_rows:
        raise StageError(
            f"{stage.folder}: {summary['images']} images, but {summary['labels']} labels and {quarantined.num_rows} quarantined"
        )
    stage.commit([LABELS_MANIFEST, QUARANTINE_NAME], summary)
    return require_done(stage.folder, "label")


def _quarantine(stage: Stage, shards: Sequence[LabeledShard]) -> pa.Table:
    """The quarantined samples of all shards as one table."""
    tables = (read_labels(stage.path(f"{entry.name}.parquet")) for entry in shards if entry.quarantined)
    return pa.concat_tables([quarantine_table([]), *(quarantine_table(read_quarantined(table)) for table in tables)])
