"""Pseudo-labels in somebody else's training: images and labels, joined on the fly.

    labels = PseudoLabels("http://labels.example:8080", min_confidence=0.8)
    for images, classes in DataLoader(labels.dataset(transform, shuffle=1000), batch_size=256, num_workers=8): …

Ranks (torch.distributed) and loader workers share the shards: every sample is handed out once in an epoch. Their shares differ in
size, so ranks that wait for each other need as many steps each, or torch's `Join`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from data import storage
from data.images.decode import DecodeError, decode
from data.labels.overlay import RowFilter
from data.labels.source import PseudoLabeled, Source
from data.labels.sources.archives import LATEST_NAME, open_exported
from data.labels.sources.run import RUN_CONFIG, open_run
from data.labels.sources.server import open_served
from data.names import read_pointer
from data.shards.split import MANIFEST_NAME, DataError
from data.storage.http import is_http
from data.storage.redact import redacted

_READERS = 8  # label files read at once
logger = logging.getLogger(__name__)


class PseudoLabels:
    """Pseudo-labels of one generation.

    Args:
        source: the address of `stage=serve`, a run directory, an export, or a folder of exports, of which the last; a path or URL.
        min_confidence: of these labels alone that are at least so sure, 0 to 1.
        classes: of these labels alone.
        selected: those alone that the student was to see; False: all.
        token: of the server at this address; without one, that of NOISY_STUDENT_TOKEN (`http://HOST:PORT=TOKEN`) if it is for the
            address.

    Raises:
        DataError: something else is there, or a part of it is missing or damaged; or the filter cannot be meant.
        StorageError, FileNotFoundError: nothing is there, or it cannot be read.
    """

    def __init__(
        self,
        source: str,
        *,
        min_confidence: float = 0.0,
        classes: Collection[int] | None = None,
        selected: bool = True,
        token: str | None = None,
    ) -> None:
        keep = RowFilter(selected, min_confidence, None if classes is None else frozenset(classes))
        self._source = _open(source, keep, token)
        self.class_names = self._source.class_names
        _check(keep, self.class_names)
        if not self._source.num_shards:
            raise DataError(
                f"{redacted(source)}: no label passes the filter; lower min_confidence, or name more classes"
            )

    def __len__(self) -> int:
        """Images; reads all labels."""
        return int(self.table().num_rows)

    def table(self) -> pa.Table:
        """All labels without images, as `data.labels.source.COLUMNS`; an image that the export repeats has a row each time."""
        with ThreadPoolExecutor(_READERS) as pool:
            tables = list(pool.map(self._source.table, range(self._source.num_shards)))
        return pa.concat_tables(tables).unify_dictionaries()

    def dataset(
        self,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        shuffle: int = 0,
        seed: int = 0,
        as_dict: bool = False,
    ) -> PseudoLabelDataset:
        """For a DataLoader.

        Args:
            transform: of the decoded image (RGB, upright); none hands out the image.
            shuffle: mix shards, and so many samples of those at a time, which are held in memory as encoded; 0: in order.
            seed: of the order.
            as_dict: `image`, `label`, `confidence`, `copies` and `key` instead of (image, label).
        """
        return PseudoLabelDataset(self._source, transform, shuffle, seed, as_dict)


class PseudoLabelDataset(IterableDataset[Any]):
    """Made by `PseudoLabels.dataset`. Iterating raises DataError where something is damaged, StorageError where it can't be read."""

    def __init__(
        self, source: Source, transform: Callable[[Image.Image], Any] | None, shuffle: int, seed: int, as_dict: bool
    ) -> None:
        self._source, self._transform, self._as_dict = source, transform, as_dict
        self._shuffle, self._seed = shuffle, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that persist see it change
        self._rank = (0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Another order for another epoch; on all ranks alike. Without it, all epochs have the same."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        part, parts = _part_of(*self._distributed())
        order = np.arange(self._source.num_shards)
        random = np.random.default_rng([self._seed, int(self._epoch)])  # of all parts alike
        if self._shuffle:
            random.shuffle(order)
        if parts > len(order) and part == 0:
            logger.warning("%d shards for %d ranks and workers together: some have no samples", len(order), parts)
        samples = chain.from_iterable(self._source.samples(int(shard)) for shard in order[part::parts])
        return map(self._item, _mixed(samples, self._shuffle, random))

    def _item(self, sample: PseudoLabeled) -> Any:
        try:
            picture = Image.fromarray(decode(sample.image))
        except DecodeError as error:
            raise DataError(f"the image of key {sample.key!r} cannot be decoded ({error})") from error
        image = self._transform(picture) if self._transform else picture
        if not self._as_dict:
            return image, sample.label
        said = {name: getattr(sample, name) for name in ("key", "label", "confidence", "copies")}
        return {"image": image} | said

    def _distributed(self) -> tuple[int, int]:
        """Rank and world size; of the process that made the loader, where this is one of its workers."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self._rank

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rank": self._distributed()}


def _part_of(rank: int, world_size: int) -> tuple[int, int]:
    """Which part of the shards this process reads, and how many parts there are."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return rank * workers + number, world_size * workers


def _mixed(samples: Iterator[PseudoLabeled], size: int, random: np.random.Generator) -> Iterator[PseudoLabeled]:
    """Each sample once, in a random order of `size` at a time."""
    waiting: list[PseudoLabeled] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) > size:
            place = int(random.integers(len(waiting)))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield waiting.pop()
    random.shuffle(waiting)
    yield from waiting


def _open(source: str, keep: RowFilter, token: str | None) -> Source:
    """Whatever kind of source is there."""
    if is_http(source):
        return open_served(source, keep, token)
    if token is not None:
        raise DataError(f"token: {redacted(source)} is no http:// or https:// address; expected no token")
    if storage.exists(storage.join(source, RUN_CONFIG)):
        return open_run(source, keep)
    if storage.exists(latest := storage.join(source, LATEST_NAME)):
        source = storage.join(source, read_pointer(latest))
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        return open_exported(source, keep)
    raise DataError(
        f"{redacted(source)}: expected a run directory ({RUN_CONFIG}), an export ({MANIFEST_NAME}), a folder of exports "
        f"({LATEST_NAME}), or the http:// address of stage=serve"
    )


def _check(keep: RowFilter, class_names: tuple[str, ...] | None) -> None:
    """Raises DataError for a filter that cannot be meant."""
    if not 0 <= keep.min_confidence <= 1:
        raise DataError(f"min_confidence={keep.min_confidence}: expected 0 to 1")
    most = len(class_names) if class_names else 1 << 31
    if keep.classes is not None and (bad := [c for c in sorted(keep.classes) if not 0 <= c < most]):
        raise DataError(f"classes: {bad[0]}: expected class numbers from 0 to {most - 1}")
