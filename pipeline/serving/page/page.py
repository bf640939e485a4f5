"""The server's page for people: what is served, how much of it, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from data.labels.overlay import RowFilter
from pipeline.pages.render import MAX_CLASS_ROWS, environment, printable
from pipeline.serving.catalog import Catalog, SampleImage

_CONFIDENCES = (0.0, 0.5, 0.8, 0.95)  # of the links


@dataclass(frozen=True)
class PageSamples:
    """The images of the page: those chosen under a filter, and how many there are under it."""

    row_filter: RowFilter
    samples: Sequence[SampleImage]
    num_matching: int


def page_html(
    catalog: Catalog, manifest: Mapping[str, Any], shown: PageSamples, url: str, needs_token: bool = False
) -> str:
    """Render the HTML document.

    Args:
        manifest: what manifest.json holds without a filter.
        shown: images to show; the page's links `samples/N` are their positions.
        url: address of the server, for the examples.
        needs_token: whether the examples have to send a token.
    """
    names, counts, query = catalog.class_names, catalog.class_counts, shown.row_filter.query()
    return environment("pipeline.serving.page").get_template("page.html").render(
        title=f"Pseudo-labels, {catalog.title}",
        name=catalog.title,
        kind=catalog.kind,
        figures=_figures(manifest),
        shards=manifest["shards"],
        url=url,
        needs_token=needs_token,
        samples=[_sample(f"samples/{at}{query}", sample, names) for at, sample in enumerate(shown.samples)],
        query=query,
        num_matching=shown.num_matching,
        filters=_filters(shown.row_filter, names) if catalog.kind == "joined" else [],
        classes=[_class_row(catalog, shown.row_filter, entry) for entry in counts[:MAX_CLASS_ROWS]],
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


def _sample(source: str, sample: SampleImage, names: Sequence[str] | None) -> dict[str, str]:
    """Arguments of the template macro `sample`."""
    name = names[sample.label] if names and sample.label < len(names) else f"class {sample.label}"
    return {"source": source, "alt": name, "title": sample.where, "words": name, "verdict": f"{sample.confidence:.1%}"}


def _filters(row_filter: RowFilter, names: Sequence[str] | None) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Links by what they filter: (words, query), or None in the place of the query in force."""

    def link(words: str, changed: RowFilter) -> tuple[str, str | None]:
        return words, None if changed == row_filter else changed.query()

    confidences = [
        link(f"≥ {value:g}" if value else "any", replace(row_filter, min_confidence=value)) for value in _CONFIDENCES
    ]
    selected = [
        link(words, replace(row_filter, selected=value))
        for words, value in (("selected", True), ("all labeled", False))
    ]
    chosen = [names[label] if names else f"class {label}" for label in sorted(row_filter.classes or ())]
    classes = [link("all", replace(row_filter, classes=None)), *((name, None) for name in chosen)]
    return [("Images", selected), ("Confidence", confidences), ("Class", classes)]


def _class_row(catalog: Catalog, row_filter: RowFilter, entry: Mapping[str, Any]) -> list[str]:
    number, name = entry["class"], entry.get("name") or ""
    cells = [str(number), name, f"{entry['kept']:,}", f"{entry['copies']:,}"]
    if catalog.kind == "joined":  # an export has no filters
        query = replace(row_filter, classes=frozenset([number])).query()
        at = 1 if name else 0
        cells[at] = Markup('<a href="./{}#images">{}</a>').format(query, printable(cells[at]))
    return cells
