"""stage=label verify=true: is what the labels folder holds what was committed, and all of it?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from tqdm import tqdm

from data import storage
from data.labels.label_files import LabeledShard, label_schema, read_labels_manifest, read_quarantined
from data.shards.split import Shard, Split, has_recorded_bytes, open_split
from data.tables import parse_table
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, refuse_other_config, require_done
from pipeline.upstream.changed_shards import describe_recorded_bytes
from teacher.labeling.stage import fingerprint

DAMAGED_FOLDER = "damaged"
_THREADS = 4
_MAX_SHOWN = 50


def verify_labels(config: Config, layout: Layout) -> None:
    """Check a finished label stage: its fingerprint; per shard the label file's digest, its schema, and that its rows and
    quarantined samples are the shard's samples, each once and in order; and that the shards are those that were labeled.

    The headers of all foreign shards are read anew, and every byte of packed ones, whose SHA-256 is recorded. A label file that is
    wrong itself is moved to the folder `damaged`, so that stage=label makes just that shard again.

    Raises:
        StageError: what is wrong, per shard; or the stage is not done, was made with another configuration, or of another corpus.
    """
    record = require_done(layout.labels, "label")
    refuse_other_config(layout.labels, "label", config.stage_fields("label"))
    teacher = require_done(layout.teacher, layout.teacher_stage)
    if teacher["digest"] != record["fingerprint"]["inputs"]["teacher"]:
        raise StageError(f"{layout.labels}: these are another teacher's labels than {layout.teacher}'s")
    made_by = fingerprint(config, teacher["digest"])
    if made_by.as_json()["inputs"] != record["fingerprint"]["inputs"]:
        raise StageError(f"{layout.labels}: labeled by another teacher.ensemble than there is now; restore its weights")
    _check_outputs(layout.labels, record["outputs"])
    entries = {entry.name: entry for entry in read_labels_manifest(layout.labels).values()}
    corpus = _open_corpus(config, layout, entries)
    top_k = min(config.label.top_k, record["summary"]["num_classes"])
    problems = list(_problems(layout.labels, corpus, entries, label_schema(top_k), made_by.digest()))
    print(f"label: {describe_recorded_bytes(corpus)}")
    if problems:
        raise StageError(_report(layout.labels, problems, len(corpus.shards)))
    labels, bad = (sum(getattr(entry, name) for entry in entries.values()) for name in ("rows", "quarantined"))
    print(f"label: {len(entries):,} shards verified: {labels:,} labels and {bad:,} quarantined, nothing lost or twice")


def _open_corpus(config: Config, layout: Layout, entries: Mapping[str, LabeledShard]) -> Split:
    """The unlabeled shards, indexed anew. Raises StageError where they have nothing in common with those that were labeled."""
    urls = storage.expand(config.data.unlabeled)
    names = {storage.base_name(url).removesuffix(".tar") for url in urls}
    if names and entries and names.isdisjoint(entries):
        raise StageError(
            f"data.unlabeled: none of its {len(urls)} shards ({urls[0]}, …) has the name of one of the {len(entries)} that were "
            "labeled: another corpus? Nothing was checked or moved; check the path"
        )
    corpus = open_split(config.data.unlabeled, layout.indexes, reindex=True)
    if entries and not any(_is_labeled(shard, entries.get(shard.name)) for shard in corpus.shards):
        raise StageError(
            f"data.unlabeled: none of its {len(urls)} shards ({urls[0]}, …) is the one that was labeled under its name: all of them "
            "have changed since, or this is another corpus. Nothing was moved. Check the path, or restore the shards; stage=label "
            "labels those that are there now"
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
    """(shard, what is wrong), after a wrong file has been moved away."""
    for name in sorted(entries.keys() - {shard.name for shard in corpus.shards}):
        yield name, "has labels, but data.unlabeled does not have the shard"

    def check(shard: Shard) -> tuple[str, bool]:
        """What is wrong, and whether the label file itself is."""
        if (entry := entries.get(shard.name)) is None:
            return "has no labels: it is new; run stage=label", False
        of_shard, of_file = _shard_problem(shard, entry), _file_problem(folder, shard, entry, schema, made_by)
        return "; ".join(filter(None, (of_file, of_shard))), bool(of_file)

    with ThreadPoolExecutor(_THREADS) as pool:
        found = tqdm(pool.map(check, corpus.shards), total=len(corpus.shards), desc="verify", unit="shard", delay=5)
        for shard, (problem, is_of_file) in zip(corpus.shards, found, strict=True):
            if is_of_file:
                _move_away(folder, shard.name)
            if problem:
                yield shard.name, problem


def _shard_problem(shard: Shard, entry: LabeledShard) -> str:
    """How a shard differs from the one that was labeled; empty when it doesn't, as far as can be told."""
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
    """What is wrong with a shard's label file; empty when nothing is."""
    url = storage.join(folder, f"{shard.name}.parquet")
    if not storage.exists(url):
        return "its label file is missing"
    content = storage.read_bytes(url)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        return f"its label file is damaged (digest differs; {len(content)} bytes, {entry.bytes} were written)"
    if entry.made_by != made_by:
        return "its labels are by another teacher or configuration"
    table = parse_table(content, url, "")
    if not table.schema.equals(schema):
        return f"its label file has another schema: {table.schema.remove_metadata()}"
    return _check_samples(shard, table) if _is_labeled(shard, entry) else ""


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
    """Move a label file to the folder of damaged ones, beside what was moved there before."""
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
    head = f"{folder}: {len(problems)} of {num_shards} shards are not as they should be:"
    tail = (
        f"Label files that are wrong themselves are in {folder}/{DAMAGED_FOLDER} now. To label again just what needs it, run "
        "stage=label."
    )
    return "\n".join([head, *lines, *more, tail])
