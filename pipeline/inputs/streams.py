"""Training batches by step number: which images, decoded and augmented, with their targets.

    Order (data.training_order) ──► bytes (data.shards.image_reader) ──► decode ──► augment ──► a batch of all streams, in exact counts

A batch is a function of (seed, step, rank, world size). Resuming at step n asks for batch n; nothing before it is read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from data.images.decode import DecodeError
from data.labels.exclusions import keys_in
from data.labels.label_files import LABELS_REMEDY, read_copies, soft_targets
from data.shards.image_reader import ImageReader, Place
from data.shards.index import INDEX_REMEDY, INDEX_SCHEMA, index_digest
from data.shards.split import DataError, Shard, Split
from data.tables import parse_table, read_table, read_whole
from data.training_order import Order, OrderSlice
from pipeline.core.schema import TrainConfig
from pipeline.inputs.noise import Noise
from pipeline.inputs.targets import pseudo_targets, smooth_one_hot
from pipeline.inputs.train_transform import TrainTransform, sample_seed

_READERS = 16  # selections read at once: an object store answers each after a while, and there are thousands
_CACHED_SHARDS = 48  # tables kept per process: three windows of shards


@dataclass(frozen=True)
class StreamSpec:
    """One stream of training images; plain data that travels to other processes.

    Attributes:
        table_urls: per shard, the Parquet table of its rows: the shard's index, or its pseudo-labels.
        copies_urls: per shard, the selection's `copies` column; None sees every row once an epoch.
        excluded: per shard, rows that are never seen; none where empty. Not together with `copies_urls`.
        images_per_step: over all ranks.
        targets: the table's labels, smoothed; or its probabilities, as they are or all on the most probable class.
        temperature: below 1 sharpens soft targets.
        table_digests: per table, an index's own digest, or the SHA-256 of a label file; not checked where empty.
        copies_digests: the same, SHA-256 of `copies_urls`.
    """

    name: str
    shard_urls: tuple[str, ...]
    table_urls: tuple[str, ...]
    num_rows: tuple[int, ...]
    images_per_step: int
    copies_urls: tuple[str, ...] | None = None
    targets: Literal["labels", "soft", "hard"] = "labels"
    temperature: float = 1.0
    excluded: tuple[tuple[int, ...], ...] = ()
    table_digests: tuple[str, ...] = ()
    copies_digests: tuple[str, ...] = ()

    @property
    def num_images(self) -> int:
        """Rows that are not excluded."""
        return sum(self.num_rows) - sum(map(len, self.excluded))


@dataclass
class _Rows:
    """A shard's rows as arrays: ordinals and bytes of the images, and targets (N, C)."""

    key: list[str]
    ordinal: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    targets: np.ndarray

    def place(self, row: int) -> Place:
        """Where a row's image is in the shard."""
        return Place(int(self.ordinal[row]), self.key[row], int(self.offset[row]), int(self.size[row]))


class _Stream:
    """A stream opened in this process."""

    def __init__(self, spec: StreamSpec, num_classes: int, label_smoothing: float, seed: int) -> None:
        self.spec = spec
        self._num_classes, self._smoothing = num_classes, label_smoothing
        self.order = Order(_read_copies(spec), seed, spec.name)
        self.reader = ImageReader(spec.shard_urls)
        self._tables: OrderedDict[int, _Rows] = OrderedDict()

    def rows(self, shard: int) -> _Rows:
        if shard not in self._tables:
            self._tables[shard] = self._load(shard)
            if len(self._tables) > _CACHED_SHARDS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]

    def where(self, shard: int, row: int) -> str:
        """An image's place, for messages."""
        return f"{self.spec.shard_urls[shard]}, key {self.rows(shard).key[row]!r}"

    def _load(self, shard: int) -> _Rows:
        table = _read_table(self.spec, shard)
        if self.spec.targets == "labels":
            labels = torch.from_numpy(table.column("label").to_numpy().astype(np.int64))
            targets = smooth_one_hot(labels, self._num_classes, self._smoothing)
        else:
            probabilities = torch.from_numpy(soft_targets(table, self._num_classes))
            targets = pseudo_targets(probabilities, self.spec.targets, self.spec.temperature)
        is_index = "__key__" not in table.column_names
        ordinals = np.arange(table.num_rows) if is_index else table.column("ordinal").to_numpy()
        keys = table.column("key" if is_index else "__key__").to_pylist()
        offsets, sizes = (table.column(name).to_numpy() for name in ("offset", "size"))
        return _Rows(keys, ordinals, offsets, sizes, targets.numpy())


def _read_table(spec: StreamSpec, shard: int) -> pa.Table:
    """A shard's rows. Raises DataError when they are not what was committed."""
    url, digest = spec.table_urls[shard], spec.table_digests[shard] if spec.table_digests else None
    if spec.targets == "labels" and digest is not None:
        table = read_table(url, INDEX_REMEDY, schema=INDEX_SCHEMA)
        if index_digest(table) != digest:
            raise DataError(
                f"{url}: not the index that this stage began with: the shard was indexed anew meanwhile; give the same command again, "
                "which says what has changed"
            )
        return table
    return parse_table(read_whole(url, digest, LABELS_REMEDY), url, LABELS_REMEDY)


def _read_copies(spec: StreamSpec) -> list[np.ndarray]:
    if spec.copies_urls is None:
        ones = [np.ones(rows, np.uint16) for rows in spec.num_rows]
        for column, excluded in zip(ones, spec.excluded, strict=bool(spec.excluded)):
            column[list(excluded)] = 0
        return ones
    with ThreadPoolExecutor(_READERS) as pool:
        copies = list(pool.map(read_copies, spec.copies_urls, spec.copies_digests or [None] * len(spec.copies_urls)))
    for url, column, rows in zip(spec.copies_urls, copies, spec.num_rows, strict=True):
        if len(column) != rows:
            raise DataError(f"{url}: {len(column)} rows, but the shard has {rows} labels; run stage=select again")
    return copies


@dataclass
class Batch:
    """images (N, 3, S, S) uint8, targets (N, C) float32, and `shard/key` of each image for messages.

    `noise` is what the images still lack, one per image; None where they have it.
    """

    images: torch.Tensor
    targets: torch.Tensor
    keys: list[str]
    noise: list[Noise] | None = None

    def pin_memory(self) -> Batch:
        """For the loader's copy to a GPU."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.keys, self.noise)


class Batches(Dataset[Batch]):
    """This rank's batch of every step: `images_per_step / world_size` images of each stream, in the order of the streams."""

    def __init__(
        self,
        specs: Sequence[StreamSpec],
        config: TrainConfig,
        num_classes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._seed, self._rank, self._world = seed, rank, world_size
        self._streams = [_Stream(spec, num_classes, config.label_smoothing, seed) for spec in specs]
        self._transform = make_transform(config)
        self._noise_later = config.augment_on == "device"

    def order(self, stream: int) -> Order:
        """The order of one stream, over all ranks."""
        return self._streams[stream].order

    def __getitem__(self, step: int) -> Batch:
        """Raises DataError, naming shard and key, for an image that cannot be decoded, and for a shard that has changed."""
        images, noises, targets, keys = [], [], [], []
        for number, stream in enumerate(self._streams):
            count = stream.spec.images_per_step
            entries = stream.order.take(step * count, count)
            for image, noise, target, key in self._samples(number, stream, entries):
                images.append(image if self._noise_later else self._transform.add_noise(image, noise))
                noises.append(noise)
                targets.append(target)
                keys.append(key)
        later = noises if self._noise_later else None
        return Batch(torch.stack(images), torch.from_numpy(np.stack(targets)), keys, later)

    def keys(self, step: int) -> list[str]:
        """`shard, key` of each image of a step's batch, over all ranks; no image is read."""
        found = []
        for stream in self._streams:
            count = stream.spec.images_per_step
            entries = stream.order.take(step * count, count)
            found += [stream.where(int(s), int(r)) for s, r in zip(entries.shard, entries.row, strict=True)]
        return found

    def close(self) -> None:
        """Close what this process has open."""
        for stream in self._streams:
            stream.reader.close()

    def _samples(
        self, number: int, stream: _Stream, entries: OrderSlice
    ) -> Iterator[tuple[torch.Tensor, Noise, np.ndarray, str]]:
        for i in range(self._rank, len(entries), self._world):
            epoch, shard, row, copy = (
                int(part[i]) for part in (entries.epoch, entries.shard, entries.row, entries.copy)
            )
            rows = stream.rows(shard)
            where = stream.where(shard, row)
            content = stream.reader.image(shard, rows.place(row))
            seed = sample_seed(self._seed, number, epoch, shard, row, copy)
            try:
                image, noise = self._transform.from_file(content, seed)
            except DecodeError as error:
                raise DataError(f"{where}: {error}; repair or remove the image") from error
            yield image, noise, rows.targets[row], where


def make_transform(config: TrainConfig) -> TrainTransform:
    """The training transform that a configuration asks for."""
    return TrainTransform(config.augment, config.image_size, config.interpolation, config.mean, config.decoder)


def labeled_stream(split: Split, images_per_step: int, exclude: frozenset[str] = frozenset()) -> StreamSpec:
    """The stream of a labeled split: every image once an epoch, but those that `exclude` names (`data.exclude.read_keys`) never.

    Raises:
        DataError: a damaged index, or all images are excluded.
    """
    excluded = tuple(_rows_with_keys(shard, keys_in(exclude, shard.name)) for shard in split.shards) if exclude else ()
    spec = StreamSpec(
        name="labeled",
        shard_urls=tuple(shard.url for shard in split.shards),
        table_urls=tuple(shard.index_url for shard in split.shards),
        num_rows=tuple(shard.num_samples for shard in split.shards),
        images_per_step=images_per_step,
        excluded=excluded,
        table_digests=tuple(shard.index_sha256 for shard in split.shards),
    )
    if not spec.num_images:
        why = (
            "data.exclude has the keys of all labeled images"
            if split.num_samples
            else "the labeled shards have no images"
        )
        raise DataError(f"{why}; nothing is left to train on")
    return spec


def _rows_with_keys(shard: Shard, keys: frozenset[str]) -> tuple[int, ...]:
    return tuple(row for row, key in enumerate(shard.index().column("key").to_pylist()) if key in keys)
