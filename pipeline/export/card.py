"""The README.md of an export: a data-set card on what the labels are, where they come from, and how far to trust them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from data import storage
from data.labels.label_files import COPIES_REMEDY
from data.shards.split import ShardRecord
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import Layout
from pipeline.core.schema import ExportConfig
from pipeline.core.stage import done_record
from pipeline.export.text import code_span, escape_markdown
from pipeline.inference.stage_weights import read_info
from pipeline.models.weights import WeightsInfo

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_MAX_CLASSES = 200  # rows of the table; selection.json has them all


class Teacher(NamedTuple):
    """The teacher's weights: their info, the stage's summary, and the SHA-256 of each file of weights."""

    info: WeightsInfo
    summary: Mapping[str, Any]
    digests: list[str]


@dataclass(frozen=True)
class CardFacts:
    """What the card shows.

    Attributes:
        form: `export.format`.
        labels, selection: summaries of the stages.
        label_fields: configuration fields and inputs that the labels depend on.
        selected: content of selection.json.
        teacher: None if the labels were copied without the run's teacher.
        only_selected: whether labels that were not selected are left out.
    """

    version: str
    form: str
    generation: int
    labels: Mapping[str, Any]
    label_fields: Mapping[str, Any]
    selection: Mapping[str, Any]
    selected: Mapping[str, Any]
    teacher: Teacher | None
    only_selected: bool


def read_card_facts(
    folder: str, config: ExportConfig, layout: Layout, labels: Mapping[str, Any], selection: Mapping[str, Any], selection_folder: str
) -> CardFacts:  # fmt: skip
    """Read what a run knows of its labels; `labels` and `selection` are their done-records."""
    return CardFacts(
        version=storage.base_name(folder),
        form=config.format,
        generation=layout.generation,
        labels=labels["summary"],
        label_fields=labels["fingerprint"]["config"] | labels["fingerprint"]["inputs"],
        selection=selection["summary"],
        selected=read_output_json(selection_folder, "selection.json", selection, COPIES_REMEDY),
        teacher=_read_teacher(layout),
        only_selected=config.selected,
    )


def _read_teacher(layout: Layout) -> Teacher | None:
    record = done_record(layout.teacher)
    if record is None:
        return None
    digests = [output["sha256"] for name, output in record["outputs"].items() if name.endswith("model.safetensors")]
    return Teacher(read_info(layout.teacher), record["summary"], digests)


def render_card(facts: CardFacts, records: Sequence[ShardRecord]) -> str:
    """Render the card as Markdown, below the YAML fields that Hugging Face reads."""
    templates = Environment(
        loader=PackageLoader("pipeline.export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "markdown": escape_markdown,
        "code_span": code_span,
        "json": json.dumps,
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
    }
    num_samples = sum(record.num_samples for record in records)
    return templates.get_template("card.md").render(
        facts=facts,
        num_samples=num_samples,
        num_files=len(records),
        num_bytes=sum(record.bytes for record in records),
        size=next((name for limit, name in _SIZES if num_samples < limit), "n>1T"),
        max_classes=_MAX_CLASSES,
    )
