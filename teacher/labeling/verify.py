"""stage=label verify=true: check that the labels folder holds what was committed, completely and unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from data import storage
from data.errors import DataError
from data.labels.label_files import LabeledShard, Quarantined, label_schema, read_labels_manifest, read_quarantined
from data.progress_bar import ProgressBar
from data.shards.split import Shard, Split, has_recorded_bytes, open_split
from data.tables import parse_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, refuse_other_config, require_done
from pipeline.upstream.changed_shards import describe_recorded_bytes
from teacher.labeling.label_calibration import CALIBRATION
from teacher.labeling.stage import fingerprint

DAMAGED_FOLDER = "damaged"
_MAX_SHOWN = 50


def verify_labels(config: Config, layout: Layout) -> None:
    """Check a finished label stage.

    - Its fingerprint matches the configuration and the teacher.
    - Each label file has the recorded digest and schema; its rows and quarantined samples are the shard's samples, each once, in order.
    - The shards are the ones that were labeled. Packed shards are read completely (their SHA-256 is recorded); of foreign shards, the
      headers.

    A wrong label file is moved to the folder `damaged`, so that stage=label makes that one again. Raises StageError, which
    lists the problems by shard; also when the stage is not done, or was made with another configuration, teacher or corpus.
    """
    record = require_done(layout.labels, "label")
    refuse_other_config(layout.labels, "label", config.stage_fields("label"))
    teacher = require_done(layout.teacher, layout.teacher_stage)
    if teacher["digest"] != record["fingerprint"]["inputs"]["teacher"]:
        raise StageError(
            f"{layout.labels}: the labels are not by the teacher in {layout.teacher}; run stage=label force=true"
        )
    made_by = fingerprint(config, teacher["digest"], record["fingerprint"]["inputs"].get(CALIBRATION))
    if made_by.as_json()["inputs"] != record["fingerprint"]["inputs"]:
        raise StageError(f"{layout.labels}: labeled by another teacher.ensemble; restore its weights")
    _check_outputs(layout.labels, record["outputs"])
    entries = read_labels_manifest(layout.labels)
    corpus = _open_corpus(config, layout, entries)
    top_k = min(config.label.top_k, record["summary"]["num_classes"])
    problems = list(_problems(layout.labels, corpus, entries, label_schema(top_k), made_by.digest()))
    print(f"label: {describe_recorded_bytes(corpus)}")
    if problems:
        raise StageError(_report(layout.labels, problems, len(corpus.shards)))
    labels, bad = (sum(getattr(entry, name) for entry in entries.values()) for name in ("rows", "quarantined"))
    print(
        f"label: {len(entries):,} shards verified: {labels:,} labels and {bad:,} quarantined; no sample lost or duplicated"
    )


def _open_corpus(config: Config, layout: Layout, entries: Mapping[str, LabeledShard]) -> Split:
    """Index the unlabeled shards anew. Raises StageError if none of them was labeled."""
    urls = storage.expand(config.data.unlabeled)
    names = {storage.base_name(url).removesuffix(".tar") for url in urls}
    if names and entries and names.isdisjoint(entries):
        raise StageError(
            f"data.unlabeled: none of its {len(urls)} shards ({urls[0]}, …) has the name of one of the {len(entries)} labeled "
            "shards: another corpus? Nothing was checked or moved; check the path"
        )
    corpus = open_split(config.data.unlabeled, layout.indexes, reindex=True)
    if entries and not any(_is_labeled(shard, entries.get(shard.name)) for shard in corpus.shards):
        raise StageError(
            f"data.unlabeled: none of its {len(urls)} shards ({urls[0]}, …) is the shard that was labeled under its name: all have "
            "changed since, or this is another corpus. Nothing was moved. Check the path or restore the shards; or run stage=label, "
            "which labels the present ones"
        )
    return corpus


def _is_labeled(shard: Shard, entry: LabeledShard | None) -> bool:
    return entry is not None and entry.is_of(shard, entry.made_by)


def _check_outputs(folder: str, outputs: dict[str, dict[str, object]]) -> None:
    for name, expected in outputs.items():
        url = storage.join(folder, name)
        if not storage.exists(url) or hashlib.sha256(storage.read_bytes(url)).hexdigest() != expected["sha256"]:
            raise StageError(f"{url}: missing or not what was committed; delete {folder}/done.json and run stage=label")


def _problems(
    folder: str, corpus: Split, entries: Mapping[str, LabeledShard], schema: pa.Schema, made_by: str
) -> Iterator[tuple[str, str]]:
    """Yield (shard, problem); move wrong label files away."""
    for name in sorted(entries.keys() - {shard.name for shard in corpus.shards}):
        yield name, "has labels, but data.unlabeled does not have the shard"

    def check(shard: Shard) -> tuple[str, bool]:
        """The problem, and whether the label file itself is wrong."""
        if (entry := entries.get(shard.name)) is None:
            return "has no labels: it is new; run stage=label", False
        of_shard, of_file = _shard_problem(shard, entry), _file_problem(folder, shard, entry, schema, made_by)
        return "; ".join(filter(None, (of_file, of_shard))), bool(of_file)

    checks = storage.in_parallel(check, corpus.shards, storage.PARALLEL_REQUESTS)
    found = ProgressBar(checks, total=len(corpus.shards), desc="verify", unit="shard")
    for shard, (problem, is_of_file) in zip(corpus.shards, found, strict=True):
        if is_of_file:
            _move_away(folder, shard.name)
        if problem:
            yield shard.name, problem


def _shard_problem(shard: Shard, entry: LabeledShard) -> str:
    """How a shard differs from the one that was labeled; empty if no difference is found."""
    if not _is_labeled(shard, entry):
        return (
            "the shard has changed since it was labeled (or has samples with several images, of which an earlier version labeled the "
            "first): restore it, or run stage=label, which labels it again"
        )
    if shard.sha256 and not has_recorded_bytes(shard):
        return (
            f"the shard's bytes are not those that were packed (other SHA-256): restore {shard.url}, or pack it again"
        )
    return ""


def _file_problem(folder: str, shard: Shard, entry: LabeledShard, schema: pa.Schema, made_by: str) -> str:
    """The problem of a shard's label file; empty if there is none."""
    url = storage.join(folder, f"{shard.name}.parquet")
    try:
        content = storage.read_bytes(url)
    except FileNotFoundError:
        return "its label file is missing"
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        return f"its label file is damaged (another SHA-256; expected {entry.bytes} bytes, got {len(content)})"
    if entry.made_by != made_by:
        return "its labels are by another teacher or configuration"
    try:
        table = parse_table(content, url, "")
        quarantined = read_quarantined(table, url)
    except DataError as error:  # of an earlier version, without checksums, and damaged before its SHA-256 was recorded
        return str(error)
    if not table.schema.equals(schema):
        return f"its label file has another schema: {table.schema.remove_metadata()}"
    return _check_samples(shard, table, quarantined) if _is_labeled(shard, entry) else ""


def _check_samples(shard: Shard, table: pa.Table, quarantined: Sequence[Quarantined]) -> str:
    """The problem if rows and quarantined samples together are not the shard's samples in order; else empty."""
    index = shard.index().column("key").to_pylist()
    labeled = zip(table.column("ordinal").to_pylist(), table.column("__key__").to_pylist(), strict=True)
    rows = [*labeled, *((row.ordinal, row.key) for row in quarantined)]
    if table.column("ordinal").to_pylist() != sorted(table.column("ordinal").to_pylist()):
        return "its rows are not in the shard's order"
    if len(rows) != len(index):
        return f"{len(index)} samples, but {table.num_rows} labels and {len(quarantined)} quarantined"
    wrong = [
        ordinal
        for (ordinal, key), expected in zip(sorted(rows), enumerate(index), strict=True)
        if (ordinal, key) != expected
    ]
    return f"sample {wrong[0]} is not the shard's, or occurs twice" if wrong else ""


def _move_away(folder: str, name: str) -> None:
    """Move a label file to the folder `damaged`, under a name that is free there."""
    url = storage.join(folder, f"{name}.parquet")
    if not storage.exists(url):
        return
    target, number = storage.join(folder, DAMAGED_FOLDER, f"{name}.parquet"), 1
    while storage.exists(target):
        number += 1
        target = storage.join(folder, DAMAGED_FOLDER, f"{name}.{number}.parquet")
    storage.move(url, target)


def _report(folder: str, problems: list[tuple[str, str]], num_shards: int) -> str:
    lines = [f"  {name}: {problem}" for name, problem in problems[:_MAX_SHOWN]]
    more = [f"  and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
    head = f"{folder}: {len(problems)} of {num_shards} shards have problems:"
    tail = f"Wrong label files are now in {folder}/{DAMAGED_FOLDER}. To label only what is missing, run stage=label."
    return "\n".join([head, *lines, *more, tail])
