"""The README.md of an export: a data-set card on what the labels are, where they come from, and how far to trust them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from data import storage
from data.labels.label_files import COPIES_REMEDY
from data.shards.split import ShardRecord
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import SELECTION_NAME, Layout
from pipeline.core.schema import ExportConfig
from pipeline.core.stage import done_record
from pipeline.export.text import code_span, markdown
from pipeline.inference.stage_weights import read_info

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_MAX_CLASSES = 200  # rows of the table; selection.json has them all


@dataclass(frozen=True)
class CardFacts:
    """What the card shows.

    Attributes:
        form: `export.format`.
        labels, selection: summaries of the stages.
        label_fields: configuration fields and inputs that the labels depend on.
        selected: content of selection.json.
        teacher: `info` of its weights, `summary` of its stage, `digests` (SHA-256) of its weights; None if the run has no teacher.
        only_selected: whether labels that were not selected are left out.
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
        selected=read_output_json(selection_folder, SELECTION_NAME, selection, COPIES_REMEDY),
        teacher=_read_teacher(layout),
        only_selected=config.selected,
    )


def _read_teacher(layout: Layout) -> dict[str, Any] | None:
    record = done_record(layout.teacher)
    if record is None:
        return None
    digests = [output["sha256"] for name, output in record["outputs"].items() if name.endswith("model.safetensors")]
    return {"info": read_info(layout.teacher), "summary": record["summary"], "digests": digests}


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
        "markdown": markdown,
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
