"""The README.md of an export: a data-set card that says what the labels are, where they come from, and how far to trust them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data import storage
from data.labels.label_files import COPIES_REMEDY
from data.shards.split import ShardRecord
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import Layout
from pipeline.core.schema import ExportConfig
from pipeline.core.stage import done_record
from pipeline.export.text import code_span, markdown
from pipeline.inference.stage_weights import read_info

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_MOST_CLASSES = 200  # rows of the table; selection.json has them all
_CITED = """\
Labels made by Noisy Student training (Xie, Luong, Hovy, Le: Self-training with Noisy Student improves ImageNet classification,
arXiv 1911.04252). Students of ResNet-RS (Bello et al.: Revisiting ResNets, arXiv 2103.07579)."""


@dataclass(frozen=True)
class Facts:
    """What the card tells.

    Attributes:
        labels, selection: summaries of the stages.
        label_fields: configuration fields and inputs that the labels depend on.
        selected: what selection.json holds.
        teacher: of the teacher's weights: model, digest, accuracy, calibration; None when labels travelled alone.
    """

    version: str
    form: str
    generation: int
    labels: Mapping[str, Any]
    label_fields: Mapping[str, Any]
    selection: Mapping[str, Any]
    selected: Mapping[str, Any]
    teacher: Mapping[str, Any] | None
    only_selected: bool


def gather_facts(
    folder: str, config: ExportConfig, layout: Layout, labels: Mapping[str, Any], selection: Mapping[str, Any], selection_folder: str
) -> Facts:  # fmt: skip
    """What a run knows of its labels; `labels` and `selection` are their done-records."""
    return Facts(
        version=storage.base_name(folder),
        form=config.format,
        generation=layout.generation,
        labels=labels["summary"],
        label_fields=labels["fingerprint"]["config"] | labels["fingerprint"]["inputs"],
        selection=selection["summary"],
        selected=read_output_json(selection_folder, "selection.json", selection, COPIES_REMEDY),
        teacher=_teacher(layout),
        only_selected=config.selected,
    )


def _teacher(layout: Layout) -> dict[str, Any] | None:
    """What the card says of the teacher."""
    record = done_record(layout.teacher)
    if record is None:
        return None
    info, summary = read_info(layout.teacher), record["summary"]
    digests = [facts["sha256"] for name, facts in record["outputs"].items() if name.endswith("model.safetensors")]
    said: dict[str, Any] = {
        "teacher": f"{markdown(info.model)} {code_span(json.dumps(info.model_args))}, {info.image_size} px",
        "its weights, SHA-256": ", ".join(digests),
        "rounds of pseudo-labels before it": info.generation,
    }
    if info.validation_top1 is not None:
        before, after = summary["calibration_error_before"], summary["calibration_error_after"]
        said |= {
            "its accuracy": f"{info.validation_top1:.2%} on {summary['validation_images']:,} validation images",
            "calibration": f"temperature {info.temperature:.3f}; expected calibration error {before:.3f} before, {after:.3f} after",
        }
    return said


def card(facts: Facts, records: Sequence[ShardRecord]) -> str:
    """Markdown, with the fields in YAML that Hugging Face reads."""
    number = sum(record.num_samples for record in records)
    parts = [_head(facts, number), _about(facts, records, number), _trust(facts), _classes(facts), _limits(facts)]
    return "\n".join([*parts, "## How to cite", "", _CITED, ""])


def _head(facts: Facts, number: int) -> str:
    pattern = {"shards": "pseudo-*.tar", "parquet": "*.parquet", "csv": "*.csv", "columns": "*.tar"}[facts.form]
    size = next((name for limit, name in _SIZES if number < limit), "n>1T")
    return f"""\
---
pretty_name: "Pseudo-labels, generation {facts.generation}, {facts.version}"
task_categories: [image-classification]
annotations_creators: [machine-generated]
size_categories: ["{size}"]
tags: [pseudo-labels, noisy-student, webdataset]
configs:
- config_name: default
  data_files:
  - split: train
    path: "{pattern}"
---

# Pseudo-labels, generation {facts.generation}, {facts.version}
"""


def _about(facts: Facts, records: Sequence[ShardRecord], number: int) -> str:
    what = {
        "shards": "WebDataset shards: of each sample the original image, `.cls` and `.json`; `labels/` has the same as Parquet",
        "parquet": "labels alone, one Parquet file for each unlabeled shard; `offset` and `size` are of the image in it",
        "columns": "labels alone, one tar for each unlabeled shard with its keys in its order: `.json`, and `.cls` if there is a label",
        "csv": "labels alone, one CSV file for each unlabeled shard",
    }[facts.form]
    which = "those that the student was to see" if facts.only_selected else "all that were labeled"
    num_bytes, images = sum(record.bytes for record in records), facts.labels["images"]
    return f"""\
{number:,} samples in {len(records):,} files, {num_bytes:,} bytes: {what}. Of {images:,} unlabeled images, {which}.
 Check the files with `sha256sum -c SHA256SUMS`.

**The labels are a model's guesses.** `confidence` is its calibrated probability; rank by it.
"""


def _trust(facts: Facts) -> str:
    lines = ["## Where the labels come from", ""]
    if facts.teacher is None:
        lines.append("- The teacher's weights were not there when this was written.")
    else:
        lines += [f"- {name}: {value}" for name, value in facts.teacher.items()]
    lines += [f"- {markdown(name)}: {code_span(json.dumps(value))}" for name, value in facts.label_fields.items()]
    rule, precision = facts.selected["rule"], facts.selected.get("precision") or {}
    lines += [
        f"- selection, {markdown(name)}: {code_span(json.dumps(value))}"
        for name, value in rule.items()
        if name != "class_thresholds"
    ]
    checked = precision.get("checked_on")
    if checked and checked["images"]:  # none lies above a high threshold
        lines.append(
            f"- of {checked['images']:,} validation images above the threshold, {checked['precision']:.1%} are right "
            f"(95 % interval {checked['low']:.1%} to {checked['high']:.1%}); so much holds for images like the labeled ones alone"
        )
    return "\n".join([*lines, ""])


def _classes(facts: Facts) -> str:
    classes = facts.selected["classes"]
    rows = [
        f"| {entry['class']} | {markdown(entry.get('name') or '')} | {entry['available']:,} | {entry['kept']:,} | {entry['copies']:,} |"
        for entry in classes[:_MOST_CLASSES]
    ]
    more = [f"\n(and {len(classes) - _MOST_CLASSES:,} more)"] if len(classes) > _MOST_CLASSES else []
    head = [
        "## Images per class",
        "",
        "| class | name | above the threshold | selected | copies |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, *more, ""])


def _limits(facts: Facts) -> str:
    reasons = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in facts.selection["reasons"].items())
    quarantined = sum(facts.labels["quarantined"].values())
    return f"""\
## Known limits

- Wrong labels are not spread evenly: they are where the teacher confuses classes. Confidences are calibrated on images like the labeled
  ones; on others they may be too high.
- Images of none of the classes have a label too.
- Left out by the selection: {reasons}. Could not be decoded: {quarantined:,}.
- The images have the licence that they had; this card grants none.
"""
