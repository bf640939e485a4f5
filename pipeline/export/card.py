"""The README.md of an export: a data-set card on what the labels are, where they come from, and how far to trust them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.labels.label_files import COPIES_REMEDY
from data.shards.split import ShardRecord
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import SELECTION_NAME, Layout
from pipeline.core.schema import ExportConfig
from pipeline.core.stage import done_record
from pipeline.inference.stage_weights import read_info
from pipeline.pages.render import MAX_CLASS_ROWS
from pipeline.pages.text import markdown_templates

_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
          (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def read_card_facts(
    version: str, config: ExportConfig, layout: Layout, labels: Mapping[str, Any], selection: Mapping[str, Any], selection_folder: str
) -> dict[str, Any]:  # fmt: skip
    """What a run knows of its labels, for the template; `labels` and `selection` are their done-records."""
    return {
        "version": version,
        "form": config.format,
        "only_selected": config.selected,
        "generation": layout.generation,
        "labels": labels["summary"],
        "label_fields": labels["fingerprint"]["config"] | labels["fingerprint"]["inputs"],
        "selection": selection["summary"],
        "selected": read_output_json(selection_folder, SELECTION_NAME, selection, COPIES_REMEDY),
        "teacher": _read_teacher(layout),
    }


def _read_teacher(layout: Layout) -> dict[str, Any] | None:
    """What its weights record, its stage's summary, and the SHA-256 of its weights; None if the run has no teacher."""
    record = done_record(layout.teacher)
    if record is None:
        return None
    digests = [output["sha256"] for name, output in record["outputs"].items() if name.endswith("model.safetensors")]
    return {"info": read_info(layout.teacher), "summary": record["summary"], "digests": digests}


def render_card(facts: Mapping[str, Any], records: Sequence[ShardRecord]) -> str:
    """Render the card (`read_card_facts`) as Markdown, below the YAML fields that Hugging Face reads."""
    num_samples = sum(record.num_samples for record in records)
    return (
        markdown_templates("pipeline.export")
        .get_template("card.md")
        .render(
            facts=facts,
            num_samples=num_samples,
            num_files=len(records),
            num_bytes=sum(record.bytes for record in records),
            size=next((name for limit, name in _SIZES if num_samples < limit), "n>1T"),
            max_classes=MAX_CLASS_ROWS,
        )
    )
