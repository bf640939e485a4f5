"""Serve a run's own shards with its labels, joined while sending: no image is stored twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa

from data import storage
from data.labels.joined_tar import JoinedTar, Rows, sample_key
from data.labels.overlay import Overlay, RowFilter
from data.labels.sources import as_table
from data.shards.image_ranges import ImageRanges
from data.shards.image_reader import Place, places_of, read_image
from data.tables import to_parquet
from pipeline.serving.catalog import (
    MAXIMUM_SAMPLE_BYTES,
    SAMPLE_SHARDS,
    SAMPLES_PER_SHARD,
    Catalog,
    Content,
    OutdatedError,
    Piece,
    SampleImage,
    ServedFile,
    ShardEntry,
    bytes_content,
    is_regular,
    spread,
)
from pipeline.serving.filters import parse_filter

_FORMAT = 2  # part of every ETag; increase it when `data.labels.joined_tar` or `as_table` change the bytes they write


@dataclass(frozen=True)
class JoinedRun(Catalog):
    """Catalog of a run's unlabeled shards with its labels. `num_classes`: bound of the classes in a filter."""

    kind = "joined"
    overlay: Overlay
    num_classes: int

    def __post_init__(self) -> None:
        # Computes it once: for a million keys it takes a second, and ETags are made in the event loop.
        _ = self.overlay.excluded.digest

    def parse(self, query: Sequence[tuple[str, str]]) -> RowFilter:
        """Parse the filter in a URL. Raises FilterError."""
        return parse_filter(query, self.num_classes)

    def shard(self, name: str, row_filter: RowFilter) -> ServedFile | None:
        """Return the joined tar of a shard; its ETag covers shard, labels, selection and filter."""
        if (position := self._positions.get(name)) is None:
            return None
        etag = f'"{self.overlay.identity(position, row_filter)}-{_FORMAT}"'
        return ServedFile(
            etag, "application/x-tar", partial(self._check, position), partial(self._layout, position, row_filter)
        )

    def labels(self, name: str, row_filter: RowFilter) -> ServedFile | None:
        """Return its labels; the ETag covers pyarrow's version too, on which Parquet's bytes depend."""
        if (position := self._positions.get(name)) is None:
            return None
        etag = f'"{self.overlay.identity(position, row_filter)}-{_FORMAT}-arrow{pa.__version__}"'
        load = partial(self._label_file, position, row_filter)
        return ServedFile(etag, "application/vnd.apache.parquet", partial(self._check, position), load)

    def entries(self, row_filter: RowFilter) -> list[ShardEntry]:
        """List all shards with their number of samples under the filter."""
        shards = self.overlay.shards
        counts = storage.in_parallel(
            lambda at: len(self._wanted(at, row_filter)), range(len(shards)), storage.PARALLEL_REQUESTS
        )
        return [ShardEntry(shard.name, count) for shard, count in zip(shards, counts, strict=True)]

    def samples(self, row_filter: RowFilter) -> list[SampleImage]:
        """See `Catalog`."""
        positions = spread(len(self.overlay.shards), SAMPLE_SHARDS)
        return [sample for position in positions for sample in self._samples_of(position, row_filter)]

    def _samples_of(self, position: int, row_filter: RowFilter) -> Iterator[SampleImage]:
        wanted = self._wanted(position, row_filter)
        labels = self.overlay.take(position, wanted[spread(len(wanted), SAMPLES_PER_SHARD)]).labels
        name = self.overlay.shards[position].name
        columns = (labels.column(column).to_pylist() for column in ("label", "confidence"))
        for place, label, confidence in zip(places_of(labels), *columns, strict=True):
            if place.size <= MAXIMUM_SAMPLE_BYTES:
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
                f"shard {shard.name!r} was rewritten since the server started; start the server again, which checks whether it is "
                "still the shard that was labeled"
            )

    def _rows(self, position: int, row_filter: RowFilter) -> Rows:
        """Read the rows to send. Raises OutdatedError if the label files have changed since the start."""
        if not self._has_files(position) or not self.overlay.is_as_committed(position):
            name = self.overlay.shards[position].name
            raise OutdatedError(f"the labels of shard {name!r} have changed; start the server again")
        return self.overlay.rows(position, row_filter)

    def _wanted(self, position: int, row_filter: RowFilter) -> np.ndarray:
        if not self._has_files(position):
            name = self.overlay.shards[position].name
            raise OutdatedError(f"the labels of shard {name!r} are missing; restore them and start the server again")
        return self.overlay.wanted(position, row_filter)

    def _has_files(self, position: int) -> bool:
        """Return False if a label file of the shard is missing or a pipe, which would block."""
        return all(map(is_regular, self.overlay.files(position)))

    def _layout(self, position: int, row_filter: RowFilter) -> Content:
        archive = JoinedTar(self.overlay.entries(self._rows(position, row_filter)))
        urls = [shard.url for shard in self.overlay.shards]

        def read(start: int, stop: int) -> Iterator[Piece]:
            with closing(ImageRanges(urls)) as images:
                yield from archive.parts(images, start, stop)

        return Content(archive.size, read)

    def _label_file(self, position: int, row_filter: RowFilter) -> Content:
        table = as_table(self._rows(position, row_filter), self.overlay.shards[position].name)
        return bytes_content(to_parquet(table))
