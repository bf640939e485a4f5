"""What is served: a run's labels joined to its images, or an exported version. Files are found by name, in a table of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import quote

from data.labels.overlay import RowFilter
from pipeline.serving.items import Item

FORMAT, FORMAT_VERSION = "noisy-student-pseudo-labels", 1
Kind = Literal["joined", "export"]


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it; `sha256` and `bytes` are known of what was exported."""

    name: str
    num_samples: int
    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class SampleImage:
    """An image to show, with its label; `read` blocks."""

    label: int
    confidence: float
    where: str
    read: Callable[[], bytes]


class Catalog(Protocol):
    """What a server serves. Methods block but for `parse`, `shard` and `labels`."""

    @property
    def kind(self) -> Kind:
        """For the manifest."""

    @property
    def title(self) -> str:
        """For people."""

    @property
    def generation(self) -> int:
        """Whose labels these are."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order, where they are known."""

    @property
    def files(self) -> Mapping[str, Item]:
        """Files beside shards and labels, by name."""

    @property
    def class_counts(self) -> Sequence[Mapping[str, Any]]:
        """Per class, as selection.json has them."""

    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """The filter in a URL. Raises FilterError."""

    def shard(self, name: str, keep: RowFilter) -> Item | None:
        """The tar of the shard of a name (without `.tar`), or None where there is none."""

    def labels(self, name: str, keep: RowFilter) -> Item | None:
        """Its labels as Parquet."""

    def entries(self, keep: RowFilter) -> list[ShardEntry]:
        """All shards, in order."""

    def samples(self) -> list[SampleImage]:
        """Some images to show."""


def manifest_of(catalog: Catalog, keep: RowFilter) -> dict[str, Any]:
    """What manifest.json says; URLs are relative to its own."""
    query, entries = keep.query(), catalog.entries(keep)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "kind": catalog.kind,
        "generation": catalog.generation,
        "class_names": list(catalog.class_names) if catalog.class_names else None,
        "num_samples": sum(entry.num_samples for entry in entries),
        "shards": [_listed(entry, query) for entry in entries],
    }


def _listed(entry: ShardEntry, query: str) -> dict[str, Any]:
    name = quote(entry.name, safe="")
    urls = {"url": f"shards/{name}.tar{query}", "labels_url": f"labels/{name}.parquet{query}"}
    said: dict[str, Any] = {"name": entry.name, **urls, "num_samples": entry.num_samples}
    return said if entry.sha256 is None else said | {"sha256": entry.sha256, "bytes": entry.bytes}
