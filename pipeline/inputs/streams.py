"""Streams of training images: which shards, which rows of them, how often, and with which targets.

    StreamSpec (plain data) ──► Stream: order (data.training_order), images (data.shards.image_reader), targets (inputs.targets)

A stream is endless: entry i is a function of the spec and the seed, so resuming reads nothing before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data import storage
from data.errors import DataError
from data.labels.exclusions import NOTHING_EXCLUDED, ExcludedKeys
from data.labels.label_files import LABELS_REMEDY, read_copies
from data.labels.top_k import TopK, stored_top_k
from data.shards.image_reader import ImageReader, Place
from data.shards.index import INDEX_REMEDY, INDEX_SCHEMA, index_digest
from data.shards.split import Shard, Split
from data.tables import parse_table, read_table, read_whole
from data.training_order import WINDOW_SHARDS, Order, OrderSlice
from pipeline.inputs.targets import SparseTargets, pseudo_label_targets, smoothed_targets

_CACHED_SHARDS = 3 * WINDOW_SHARDS  # tables kept per process, about 1 MB each


@dataclass(frozen=True)
class StreamSpec:
    """One stream of training images; plain data, to be sent to other processes.

    Attributes:
        table_urls: per shard, the Parquet table of its rows: the shard's index, or its pseudo-labels.
        num_rows: per shard, rows of that table.
        images_per_step: over all ranks.
        copies_urls: per shard, the selection's `copies` column; None: every row once an epoch.
        targets: `labels` are the table's labels, smoothed; `soft` its probabilities; `hard` one-hot on the most probable class;
            `none`: the table is an index, whose labels are not read.
        temperature: of soft targets; below 1 sharpens them.
        excluded: per shard, rows that are never seen; empty: none. Not together with `copies_urls`.
        views: of each image, with crops and noise of their own.
        table_digests: per table, the digest of an index, or the SHA-256 of a label file; empty: not checked.
        copies_digests: per file of `copies_urls`, its SHA-256; empty: not checked.
    """

    name: str
    shard_urls: tuple[str, ...]
    table_urls: tuple[str, ...]
    num_rows: tuple[int, ...]
    images_per_step: int
    copies_urls: tuple[str, ...] | None = None
    targets: Literal["labels", "soft", "hard", "none"] = "labels"
    temperature: float = 1.0
    excluded: tuple[Sequence[int], ...] = ()
    table_digests: tuple[str, ...] = ()
    copies_digests: tuple[str, ...] = ()
    views: int = 1

    @property
    def num_images(self) -> int:
        """Rows that are not excluded."""
        return sum(self.num_rows) - sum(map(len, self.excluded))


def labeled_stream(split: Split, images_per_step: int, exclude: ExcludedKeys = NOTHING_EXCLUDED) -> StreamSpec:
    """The stream of a labeled split: every image once an epoch, except those that the user's list excludes.

    Raises:
        DataError: a damaged index, or no images are left.
    """
    excluded = tuple(storage.in_parallel(lambda shard: _excluded_rows(shard, exclude), split.shards)) if exclude else ()
    spec = StreamSpec(
        name="labeled",
        shard_urls=tuple(shard.url for shard in split.shards),
        table_urls=tuple(shard.index_url for shard in split.shards),
        num_rows=tuple(shard.num_samples for shard in split.shards),
        images_per_step=images_per_step,
        excluded=excluded,
        table_digests=tuple(shard.index_sha256 for shard in split.shards),
    )
    if not split.num_samples:
        raise DataError("the labeled shards have no images; nothing is left to train on")
    if not spec.num_images:
        raise DataError("data.exclude has the keys of all labeled images; nothing is left to train on")
    return spec


def _excluded_rows(shard: Shard, exclude: ExcludedKeys) -> tuple[int, ...]:
    keys = shard.index().column("key").combine_chunks()
    return tuple(np.flatnonzero(exclude.mask(shard.name, keys)).tolist())


@dataclass(frozen=True)
class _Rows:
    """Rows of a shard as stored: keys and, as arrays, each image's ordinal, offset and size (bytes).

    `labels` are those of the table, int (N,), or the probabilities that the teacher gave; None where they are not read.
    """

    key: pa.StringArray
    ordinal: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | TopK | None

    def place(self, row: int) -> Place:
        """Where a row's image is in the shard."""
        return Place(int(self.ordinal[row]), self.key[row].as_py(), int(self.offset[row]), int(self.size[row]))


class Stream:
    """A stream opened in this process.

    Raises:
        DataError: a selection is not what was committed, or has another number of rows than the labels.
    """

    def __init__(self, spec: StreamSpec, num_classes: int, label_smoothing: float, seed: int) -> None:
        self.spec = spec
        self._num_classes, self._smoothing = num_classes, label_smoothing
        self.order = Order(_read_copies(spec), seed, spec.name)
        self.reader = ImageReader(spec.shard_urls)
        self._tables: OrderedDict[int, _Rows] = OrderedDict()

    def entries(self, step: int) -> OrderSlice:
        """The entries of a step, over all ranks."""
        count = self.spec.images_per_step
        return self.order.take(step * count, count)

    def load(self, shards: np.ndarray) -> None:
        """Read the tables of shards (int [n]) that are not cached, many at once. Raises as `rows`."""
        missing = [shard for shard in np.unique(shards).tolist() if shard not in self._tables][:_CACHED_SHARDS]
        for shard, rows in zip(missing, storage.in_parallel(self._load, missing), strict=True):
            self._keep(shard, rows)

    def rows(self, shard: int) -> _Rows:
        """A shard's rows, cached. Raises DataError when its table is not what was committed."""
        if shard not in self._tables:
            self._keep(shard, self._load(shard))
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def _keep(self, shard: int, rows: _Rows) -> None:
        self._tables[shard] = rows
        if len(self._tables) > _CACHED_SHARDS:
            self._tables.popitem(last=False)

    def describe(self, shard: int, row: int) -> str:
        """Shard and key of an image, for messages."""
        return f"{self.spec.shard_urls[shard]}, key {self.rows(shard).key[row].as_py()!r}"

    def targets(self, entries: OrderSlice) -> SparseTargets | None:
        """The targets of entries; None with targets `none`. Raises as `rows`."""
        if self.spec.targets == "none":
            return None
        self.load(entries.shard)
        labels = [self._label(shard, row) for _, shard, row, _ in entries.tuples()]
        if self.spec.targets == "labels":
            return smoothed_targets(np.array(labels), self._num_classes, self._smoothing)
        top_k = TopK(*map(np.array, zip(*labels, strict=True)))
        return pseudo_label_targets(top_k, self._num_classes, self.spec.targets, self.spec.temperature)

    def _label(self, shard: int, row: int) -> Any:
        """Label of a row; or its index, prob and rest."""
        labels = self.rows(shard).labels
        assert labels is not None, "targets `none` ask for no label"
        return (labels.index[row], labels.prob[row], labels.rest[row]) if isinstance(labels, TopK) else labels[row]

    def _load(self, shard: int) -> _Rows:
        table = _read_table(self.spec, shard)
        labels = _labels(table, self.spec.targets)
        is_index = "__key__" not in table.column_names
        ordinals = np.arange(table.num_rows) if is_index else table.column("ordinal").to_numpy()
        keys = table.column("key" if is_index else "__key__").combine_chunks()
        offsets, sizes = (table.column(name).to_numpy() for name in ("offset", "size"))
        return _Rows(keys, ordinals, offsets, sizes, labels)


def _labels(table: pa.Table, targets: str) -> np.ndarray | TopK | None:
    if targets == "none":
        return None
    return table.column("label").to_numpy() if targets == "labels" else stored_top_k(table)


def _read_table(spec: StreamSpec, shard: int) -> pa.Table:
    """A shard's index or labels. Raises DataError when they are not what was committed."""
    url, digest = spec.table_urls[shard], spec.table_digests[shard] if spec.table_digests else None
    if spec.targets in ("labels", "none") and digest is not None:
        table = read_table(url, INDEX_REMEDY, schema=INDEX_SCHEMA)
        if index_digest(table) != digest:
            raise DataError(
                f"{url}: not the index that this stage began with: the shard was indexed again since; run the same command again, "
                "which says what has changed"
            )
        return table
    return parse_table(read_whole(url, digest, LABELS_REMEDY), url, LABELS_REMEDY)


def _read_copies(spec: StreamSpec) -> Iterator[np.ndarray]:
    """Per shard, how often each row is seen in an epoch, (num_rows,)."""
    if spec.copies_urls is None:
        for rows, excluded in zip(spec.num_rows, spec.excluded or [()] * len(spec.num_rows), strict=True):
            column = np.ones(rows, np.uint16)
            column[list(excluded)] = 0
            yield column
        return
    digests = spec.copies_digests or [None] * len(spec.copies_urls)
    files = list(zip(spec.copies_urls, digests, spec.num_rows, strict=True))
    yield from storage.in_parallel(lambda file: _read_column(*file), files)


def _read_column(url: str, digest: str | None, num_rows: int) -> np.ndarray:
    column = read_copies(url, digest)
    if len(column) != num_rows:
        raise DataError(f"{url}: {len(column)} rows, but the shard has {num_rows} labels; run stage=select again")
    return column
