"""stage=export: write pseudo-labels for other projects, with or without the images, as an immutable version.

RUN/exports/v1/   pseudo-000000.tar … (images, .cls, .json), index/, labels/ (the same as Parquet), or labels only
                  manifest.json, _info.json (timm), wids.json, sizes.json (open_clip), SHA256SUMS, classes.txt, README.md
RUN/exports/latest   name of the newest version
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from data import storage
from data.labels.exclusions import exclude_inputs
from data.labels.sources.archives import LATEST_NAME
from data.shards.split import MANIFEST_NAME, ShardRecord
from pipeline.core.layout import VERSION, Layout
from pipeline.core.ray_runtime import start_ray
from pipeline.core.schema import Config
from pipeline.core.stage import (
    Fingerprint,
    Stage,
    StageError,
    StageRefusedError,
    inspect_stage,
    open_stage,
    require_done,
)
from pipeline.export.card import read_card_facts, render_card
from pipeline.export.manifests import read_manifest, write_manifests
from pipeline.export.plan import plan_files
from pipeline.export.shards import has_tables, tables_of
from pipeline.export.tasks import RECORDS_FOLDER, ExportJob, make_files, read_records, write_record
from pipeline.upstream.stage_inputs import open_overlay

CARD_NAME = "README.md"


def export(config: Config, layout: Layout, force: bool = False) -> dict[str, Any]:
    """Run or continue the stage; return its done-record. The same labels, selection and settings give the same version.

    Raises:
        StageError: labels or selection are missing or do not match, nothing is selected, or a class name is not UTF-8.
        DataError: unlabeled shards are missing or were cut short.
    """
    overlay, labels, selection = open_overlay(config, layout)
    _check_names(overlay.provenance.class_names or ())
    inputs = {"labels": labels["digest"], "selection": selection["digest"]} | exclude_inputs(config.data.exclude)
    expected = Fingerprint(config.stage_fields("export"), inputs)
    out = config.export.out or layout.exports
    version = _version(out, expected)
    stage = open_stage(storage.join(out, version), "export", expected, force)
    finished = _finished_files(stage)
    if stage.is_done and len(finished) < len(read_manifest(stage.folder).shards):
        stage.reopen("files of it are missing or cut short; they are made again")
        for record in finished.values():
            write_record(stage.folder, record)
    if not stage.is_done:
        start_ray(config.ray_address)
        files, total = plan_files(config, overlay)
        records = make_files(ExportJob(overlay, config.export, stage.folder), files, finished, total)
        _commit(config, layout, stage, records, labels, selection)
    storage.write_text(storage.join(out, LATEST_NAME), version + "\n")
    return require_done(stage.folder, "export")


def _check_names(names: Sequence[str]) -> None:
    """Raise StageError if a class name is not UTF-8."""
    for number, name in enumerate(names):
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise StageError(
                f"stage=export: the name of class {number}, {name!a}, is not UTF-8; rename its folder, and pack and label again"
            ) from None


def _version(out: str, expected: Fingerprint) -> str:
    """Return the version with this fingerprint, finished or not, else the next number."""
    numbers = sorted(int(match[1]) for name in storage.list_names(out) if (match := VERSION.fullmatch(name)))
    for number in reversed(numbers):
        try:
            inspect_stage(storage.join(out, f"v{number}"), "export", expected)
        except StageRefusedError:
            continue
        return f"v{number}"
    return f"v{numbers[-1] + 1 if numbers else 1}"


def _finished_files(stage: Stage) -> dict[str, ShardRecord]:
    """Return records of the whole files, by name: from the records, and, if the export was finished once, from its manifest."""
    found = read_records(stage.folder)
    if storage.exists(stage.path(MANIFEST_NAME)):
        sizes = storage.list_sizes(stage.folder)
        whole = [r for r in read_manifest(stage.folder).shards if sizes.get(r.name) == r.bytes]
        if not stage.is_done:  # else `open_stage` has checked the sizes of the tables
            with ThreadPoolExecutor(storage.PARALLEL_REQUESTS) as pool:
                checks = pool.map(partial(has_tables, stage.folder), whole)
                whole = [record for record, is_whole in zip(whole, checks, strict=True) if is_whole]
        found |= {record.name: record for record in whole}
    return found


def _commit(
    config: Config, layout: Layout, stage: Stage, records: Sequence[ShardRecord], labels: Mapping[str, Any],
    selection: Mapping[str, Any],
) -> None:  # fmt: skip
    names = labels["summary"]["class_names"]
    outputs = write_manifests(stage.folder, records, names, config.export.format == "shards")
    selection_folder = layout.current_selection()
    assert selection_folder is not None, "open_overlay has required it"
    facts = read_card_facts(storage.base_name(stage.folder), config.export, layout, labels, selection, selection_folder)
    storage.write_text(stage.path(CARD_NAME), render_card(facts, records))
    storage.remove(stage.path(RECORDS_FOLDER))  # the manifest has them; after the marker nobody would remove them
    summary = {
        "generation": layout.generation,
        "selection": storage.base_name(selection_folder),
        "samples": sum(record.num_samples for record in records),
        "files": len(records),
        "bytes": (num_bytes := sum(record.bytes for record in records)),
    }
    stage.commit([*outputs, CARD_NAME, *(name for record in records for name in tables_of(record))], summary)
    print(
        f"export: {summary['samples']:,} samples in {summary['files']:,} files, {num_bytes / 1e9:.3g} GB: {stage.folder}"
    )
