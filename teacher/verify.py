"""stage=label verify=true: is what the labels folder holds what was committed, and all of it?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from tqdm import tqdm

from data import storage
from data.label_files import LabeledShard, label_schema, read_manifest, read_quarantined
from data.manifest import Shard, Split, open_split
from data.tables import parse_table
from pipeline.fields import Config
from pipeline.layout import Layout
from pipeline.stage import StageError, refuse_other_config, require_done
from teacher.label import fingerprint

DAMAGED_FOLDER = "damaged"
_THREADS = 4
_MAX_SHOWN = 50


def verify_labels(config: Config, layout: Layout) -> None:
    """Check a finished label stage: its fingerprint, and per shard the file's digest, its schema, and that its rows and
    quarantined samples are the shard's samples, each once and in order.

    A file that is wrong is moved to the folder `damaged`, so that stage=label makes just that shard again.

    Raises:
        StageError: what is wrong, per shard; or the stage is not done, or was made with another configuration.
    """
    record = require_done(layout.labels, "label")
    refuse_other_config(layout.labels, "label", config.stage_fields("label"))
    teacher = require_done(layout.teacher, "teacher" if layout.generation == 1 else "student")
    if teacher["digest"] != record["fingerprint"]["inputs"]["teacher"]:
        raise StageError(f"{layout.labels}: these are another teacher's labels than {layout.teacher}'s")
    _check_outputs(layout.labels, record["outputs"])
    corpus = open_split(config.data.unlabeled, layout.indexes)
    entries = {entry.name: entry for entry in read_manifest(layout.labels)}
    made_by = fingerprint(config, teacher["digest"]).digest()
    top_k = min(config.label.top_k, record["summary"]["num_classes"])
    problems = list(_problems(layout.labels, corpus, entries, label_schema(top_k), made_by))
    if problems:
        raise StageError(_report(layout.labels, problems, len(corpus.shards)))
    labels, bad = (sum(getattr(entry, name) for entry in entries.values()) for name in ("rows", "quarantined"))
    print(f"label: {len(entries):,} shards verified: {labels:,} labels and {bad:,} quarantined, nothing lost or twice")


def _check_outputs(folder: str, outputs: dict[str, dict[str, object]]) -> None:
    for name, expected in outputs.items():
        url = storage.join(folder, name)
        if not storage.exists(url) or hashlib.sha256(storage.read_bytes(url)).hexdigest() != expected["sha256"]:
            raise StageError(f"{url}: missing or not what was committed; delete {folder}/done.json and run stage=label")


def _problems(
    folder: str, corpus: Split, entries: dict[str, LabeledShard], schema: pa.Schema, made_by: str
) -> Iterator[tuple[str, str]]:
    """(shard, what is wrong), after a wrong file has been moved away."""
    for name in sorted(entries.keys() - {shard.name for shard in corpus.shards}):
        yield name, "has labels, but data.unlabeled does not have the shard"

    def check(shard: Shard) -> str:
        entry = entries.get(shard.name)
        return _problem(folder, shard, entry, schema, made_by) if entry else "has no labels: it is new; run stage=label"

    with ThreadPoolExecutor(_THREADS) as pool:
        found = tqdm(pool.map(check, corpus.shards), total=len(corpus.shards), desc="verify", unit="shard", delay=5)
        for shard, problem in zip(corpus.shards, found, strict=True):
            if problem:
                _move_away(folder, shard.name)
                yield shard.name, problem


def _problem(folder: str, shard: Shard, entry: LabeledShard, schema: pa.Schema, made_by: str) -> str:
    """What is wrong with a shard's label file; empty when nothing is."""
    url = storage.join(folder, f"{shard.name}.parquet")
    if not storage.exists(url):
        return "its label file is missing"
    content = storage.read_bytes(url)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        return f"its label file is damaged (digest differs; {len(content)} bytes, {entry.bytes} were written)"
    if not entry.is_of(shard, made_by):
        return "the shard has changed since it was labeled, or these are labels by another teacher or configuration"
    table = parse_table(content, url, "")
    if not table.schema.equals(schema):
        return f"its label file has another schema: {table.schema.remove_metadata()}"
    return _check_samples(shard, table)


def _check_samples(shard: Shard, table: pa.Table) -> str:
    """Rows and quarantined samples together must be the shard's samples, in order."""
    index, quarantined = shard.index().column("key").to_pylist(), read_quarantined(table)
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
    return f"sample {wrong[0]} is not the shard's, or is there twice" if wrong else ""


def _move_away(folder: str, name: str) -> None:
    url = storage.join(folder, f"{name}.parquet")
    if storage.exists(url):
        storage.move(url, storage.join(folder, DAMAGED_FOLDER, f"{name}.parquet"))


def _report(folder: str, problems: list[tuple[str, str]], num_shards: int) -> str:
    lines = [f"  {name}: {problem}" for name, problem in problems[:_MAX_SHOWN]]
    more = [f"  and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
    head = f"{folder}: {len(problems)} of {num_shards} shards are not as they should be:"
    tail = f"Label files that are wrong were moved to {folder}/{DAMAGED_FOLDER}. To make just these shards again, run stage=label."
    return "\n".join([head, *lines, *more, tail])
