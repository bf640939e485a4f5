"""The server's page for people: what is served, how much of it, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pages.render import MAX_CLASS_ROWS, environment
from pipeline.serving.catalog import Catalog, SampleImage


def page_html(
    catalog: Catalog, manifest: Mapping[str, Any], samples: Sequence[SampleImage], url: str, needs_token: bool = False
) -> str:
    """Render the HTML document.

    Args:
        manifest: what manifest.json holds.
        samples: images to show; the page's links `samples/N` are their positions.
        url: address of the server, for the examples.
        needs_token: whether the examples have to send a token.
    """
    names, counts = catalog.class_names, catalog.class_counts
    return environment("pipeline.serving.page").get_template("page.html").render(
        title=f"Pseudo-labels, {catalog.title}",
        name=catalog.title,
        kind=catalog.kind,
        figures=_figures(manifest),
        shards=manifest["shards"],
        url=url,
        needs_token=needs_token,
        samples=[_sample(sample, names) for sample in samples],
        classes=[_class_row(entry) for entry in counts[:MAX_CLASS_ROWS]],
        num_more_classes=max(0, len(counts) - MAX_CLASS_ROWS),
    )  # fmt: skip


def _figures(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    numbers = {
        "samples": manifest["num_samples"],
        "shards": len(manifest["shards"]),
        "generation": manifest["generation"],
        "classes": len(manifest["class_names"] or ()),
    }
    return [(f"{number:,}", words) for words, number in numbers.items() if number or words != "classes"]


def _sample(sample: SampleImage, names: Sequence[str] | None) -> dict[str, str]:
    name = names[sample.label] if names and sample.label < len(names) else f"class {sample.label}"
    return {"name": name, "where": sample.where, "confidence": f"{sample.confidence:.1%}"}


def _class_row(entry: Mapping[str, Any]) -> list[str]:
    return [str(entry["class"]), entry.get("name") or "", f"{entry['kept']:,}", f"{entry['copies']:,}"]
