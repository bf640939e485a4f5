"""The page for people: what is served, how much of it, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pages.html import code, folded, heading, page, paragraph, section, table, text, tiles
from pipeline.serving.catalog import Catalog, SampleImage
from pipeline.serving.page.examples import examples

_MOST_CLASSES = 200  # rows of the table
_TOKEN = "This server wants a token. The examples take it from the environment variable TOKEN, so that it is in no URL."
_WHAT = {
    "joined": "Images of unlabeled shards with the labels that a teacher gave them, joined while they are sent. "
    "A filter in the URL (?min_confidence=0.8&classes=3,7&selected=false) leaves out what you do not want.",
    "export": "An exported version: it never changes, and is served as its files are.",
}


def page_of(
    catalog: Catalog, manifest: Mapping[str, Any], samples: Sequence[SampleImage], url: str, needs_token: bool = False
) -> str:
    """The HTML document; every text in it is escaped. `url`, `needs_token`: for the examples."""
    names = catalog.class_names
    return page(
        f"Pseudo-labels, {catalog.title}",
        [
            f"<h1>Pseudo-labels</h1>{paragraph(catalog.title, 'soft')}",
            tiles(_figures(manifest)),
            section(
                "What this is",
                paragraph(_WHAT[catalog.kind]),
                paragraph("The labels are a model's guesses. “confidence” is its calibrated probability: rank by it."),
                _links(),
            ),
            section("How to read it", *_examples(url, manifest, needs_token)),
            section("Some of the images", _gallery(samples, names)),
            section("Classes", _classes(catalog.class_counts)),
        ],
    )


def _figures(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    classes = manifest["class_names"]
    figures = [(f"{manifest['num_samples']:,}", "samples"), (f"{len(manifest['shards']):,}", "shards")]
    return [
        *figures,
        (f"{manifest['generation']}", "generation"),
        *([(f"{len(classes):,}", "classes")] if classes else []),
    ]


def _links() -> str:
    paths = ("manifest.json", "openapi.json", "metrics")
    return "<p>" + " · ".join(f'<a href="{path}">/{path}</a>' for path in paths) + "</p>"


def _examples(url: str, manifest: Mapping[str, Any], needs_token: bool) -> list[str]:
    shown = [heading(consumer) + code(words) for consumer, words in examples(url, manifest, needs_token)]
    return [paragraph(_TOKEN), *shown] if needs_token else shown


def _gallery(samples: Sequence[SampleImage], names: Sequence[str] | None) -> str:
    figures = "".join(_figure(number, sample, names) for number, sample in enumerate(samples))
    return f'<div class="grid">{figures}</div>' if figures else ""


def _figure(number: int, sample: SampleImage, names: Sequence[str] | None) -> str:
    name = names[sample.label] if names and sample.label < len(names) else f"class {sample.label}"
    return (
        f'<div class="sample"><img src="samples/{number}" alt="{text(name)}" loading="lazy" title="{text(sample.where)}">'
        f"{text(name)}<br>{sample.confidence:.1%}</div>"
    )


def _classes(counts: Sequence[Mapping[str, Any]]) -> str:
    if not counts:
        return ""
    rows = [
        (entry["class"], entry.get("name") or "", f"{entry['kept']:,}", f"{entry['copies']:,}")
        for entry in counts[:_MOST_CLASSES]
    ]
    shown = table(("class", "name", "selected images", "copies for the student"), rows)
    more = f"and {len(counts) - _MOST_CLASSES:,} more" if len(counts) > _MOST_CLASSES else ""
    return folded("Images per class", shown + (paragraph(more) if more else ""))
