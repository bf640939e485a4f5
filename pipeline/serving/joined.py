"""A run's labels joined to its unlabeled shards while they are sent; no image is stored twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.exclusions import keys_digest
from data.labels.joined_tar import JoinedTar, Rows, sample_key
from data.labels.overlay import Overlay, RowFilter
from data.labels.source import as_table
from data.shards.image_reader import ImageReader, Place, places_of, read_image
from data.tables import to_parquet
from pipeline.serving.catalog import Kind, SampleImage, ShardEntry
from pipeline.serving.filters import parse_filter
from pipeline.serving.items import Body, Item, OutdatedError, bytes_body, is_regular

_FORMAT = 2  # part of every ETag: another number when `data.labels.joined_tar` or `as_table` write other bytes of the same rows
_READERS = 8  # label files read at once
_SAMPLE_SHARDS, _SAMPLES_EACH, _MOST_SAMPLE_BYTES = 4, 6, 4 << 20


@dataclass(frozen=True)
class JoinedRun:
    """A catalog of a run's own shards.

    Attributes:
        num_classes: for checking filters.
        class_counts: as selection.json has them.
    """

    overlay: Overlay
    num_classes: int
    title: str
    class_counts: Sequence[Mapping[str, Any]]
    kind: Kind = "joined"
    files: Mapping[str, Item] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys_digest(self.overlay.excluded)  # once, before the event loop asks for ETags: a million keys take a second

    @property
    def generation(self) -> int:
        """Whose labels these are."""
        return self.overlay.provenance.generation

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """In label order, where they are known."""
        return self.overlay.provenance.class_names

    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """The filter in a URL. Raises FilterError."""
        return parse_filter(query, self.num_classes)

    def shard(self, name: str, keep: RowFilter) -> Item | None:
        """The joined tar of a shard; its ETag is over shard, labels, selection and filter."""
        if (position := self._positions.get(name)) is None:
            return None
        etag = f'"{self.overlay.identity(position, keep)}-{_FORMAT}"'
        return Item(etag, "application/x-tar", partial(self._check, position), partial(self._lay_out, position, keep))

    def labels(self, name: str, keep: RowFilter) -> Item | None:
        """The labels in it; the ETag names pyarrow's version too, on which the bytes of Parquet depend."""
        if (position := self._positions.get(name)) is None:
            return None
        etag = f'"{self.overlay.identity(position, keep)}-{_FORMAT}-arrow{pa.__version__}"'
        load = partial(self._label_file, position, keep)
        return Item(etag, "application/vnd.apache.parquet", partial(self._check, position), load)

    def entries(self, keep: RowFilter) -> list[ShardEntry]:
        """All shards, with their samples under the filter."""
        shards = self.overlay.shards
        with ThreadPoolExecutor(_READERS) as pool:
            counts = list(pool.map(lambda at: len(self._wanted(at, keep)), range(len(shards))))
        return [ShardEntry(shard.name, count) for shard, count in zip(shards, counts, strict=True)]

    def samples(self) -> list[SampleImage]:
        """Images of a few shards, spread evenly over each."""
        shards = np.unique(np.linspace(0, len(self.overlay.shards) - 1, _SAMPLE_SHARDS).astype(int)).tolist()
        return [sample for position in shards for sample in self._samples_of(position)]

    def _samples_of(self, position: int) -> Iterator[SampleImage]:
        wanted = self._wanted(position, RowFilter())
        places = np.unique(np.linspace(0, max(len(wanted) - 1, 0), _SAMPLES_EACH).astype(int))
        rows = self.overlay.take(position, wanted[places] if len(wanted) else wanted)
        name = self.overlay.shards[position].name
        said = (rows.labels.column(column).to_pylist() for column in ("label", "confidence"))
        for place, label, confidence in zip(places_of(rows.labels), *said, strict=True):
            if place.size <= _MOST_SAMPLE_BYTES:
                read = partial(self._image, position, place)
                yield SampleImage(label, confidence, sample_key(name, place.ordinal), read)

    def _image(self, position: int, place: Place) -> bytes:
        self._check(position)
        return read_image(self.overlay.shards[position].url, place)

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {shard.name: position for position, shard in enumerate(self.overlay.shards)}

    def _check(self, position: int) -> None:
        shard = self.overlay.shards[position]
        try:
            size, version = storage.file_info(shard.url)
        except FileNotFoundError:
            size, version = 0, ""
        if size != shard.bytes or not is_regular(shard.url):
            raise OutdatedError(
                f"shard {shard.name!r} has {size} bytes now, and {shard.bytes} when it was labeled; restore it, or run "
                "stage=label and start the server again"
            )
        if shard.version and version and version != shard.version:
            raise OutdatedError(
                f"shard {shard.name!r} was written anew since the server started; start the server again, which looks whether it is "
                "still the one that was labeled"
            )

    def _rows(self, position: int, keep: RowFilter) -> Rows:
        """The rows that are handed out. Raises OutdatedError when the files that say so are not those of the start."""
        if not self._are_files(position) or not self.overlay.is_as_committed(position):
            name = self.overlay.shards[position].name
            raise OutdatedError(f"the labels of shard {name!r} have changed; start the server again")
        return self.overlay.rows(position, keep)

    def _wanted(self, position: int, keep: RowFilter) -> np.ndarray:
        if not self._are_files(position):
            name = self.overlay.shards[position].name
            raise OutdatedError(f"the labels of shard {name!r} are missing; restore them and start the server again")
        return self.overlay.wanted(position, keep)

    def _are_files(self, position: int) -> bool:
        """False where a shard's label files are gone, or pipes, which would be read for ever."""
        return all(map(is_regular, self.overlay.files(position)))

    def _lay_out(self, position: int, keep: RowFilter) -> Body:
        archive = JoinedTar(self.overlay.entries(self._rows(position, keep)))
        urls = [shard.url for shard in self.overlay.shards]

        def read(start: int, stop: int) -> Iterator[bytes]:
            with ImageReader(urls) as reader:
                yield from archive.read(reader, start, stop)

        return Body(archive.size, read)

    def _label_file(self, position: int, keep: RowFilter) -> Body:
        table = as_table(self._rows(position, keep), self.overlay.shards[position].name)
        return bytes_body(to_parquet(table))
