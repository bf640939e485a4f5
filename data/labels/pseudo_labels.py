"""Pseudo-labels for other projects' training: images and labels, joined on the fly.

    labels = PseudoLabels("http://labels.example:8080", min_confidence=0.8)
    for images, classes in DataLoader(labels.dataset(transform, shuffle=1000), batch_size=256, num_workers=8): …

Ranks (torch.distributed) and loader workers divide the shards: each sample appears once per epoch. Shares differ in size, so ranks that
synchronize must stop after the same number of steps or use torch's `Join`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from data import storage
from data.base_names import read_pointer
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.labels.overlay import RowFilter
from data.labels.sources import PseudoLabeled, Source
from data.labels.sources.archives import LATEST_NAME, open_exported
from data.labels.sources.run import open_run
from data.labels.sources.server import open_served
from data.run_names import CONFIG_NAME
from data.shards.split import MANIFEST_NAME
from data.storage.http import is_http
from data.storage.redact import redacted

logger = logging.getLogger(__name__)


class PseudoLabels:
    """Pseudo-labels of one generation.

    Args:
        source: path or URL of a run directory, an export, a folder of exports (the last one is used), or the address of `stage=serve`.
        min_confidence: only labels with confidence ≥ this, 0 to 1.
        classes: only images with these labels.
        selected: only images selected for the student; False: all.
        token: of the server; by default the one that NOISY_STUDENT_TOKEN (`http://HOST:PORT=TOKEN`) has for this address.

    Raises:
        DataError: `source` is something else, or incomplete or damaged; or the filter has impossible values or passes no label.
        StorageError, FileNotFoundError: `source` does not exist or cannot be read.
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
        _check_filter(keep, self.class_names)
        if not self._source.num_shards:
            raise DataError(
                f"{redacted(source)}: no label passes the filter; lower min_confidence, or name more classes"
            )

    def __len__(self) -> int:
        """Number of images. Reads all labels."""
        return int(self.table().num_rows)

    def table(self) -> pa.Table:
        """All labels without images: `data.labels.sources.COLUMNS`. An image that the export repeats has a row for each copy."""
        tables = storage.in_parallel(self._source.table, range(self._source.num_shards), storage.PARALLEL_REQUESTS)
        return pa.concat_tables(tables).unify_dictionaries()

    def dataset(
        self,
        transform: Callable[[Image.Image], Any] | None = None,
        *,
        shuffle: int = 0,
        seed: int = 0,
        as_dict: bool = False,
    ) -> PseudoLabelDataset:
        """A dataset for a DataLoader.

        Args:
            transform: applied to the decoded image (RGB, upright); by default the image itself.
            shuffle: shuffle shards, and samples in a buffer of this many encoded images; 0: in order.
            seed: of the shuffling.
            as_dict: give dicts of `image`, `label`, `confidence`, `copies` and `key` instead of (image, label).
        """
        return PseudoLabelDataset(self._source, transform, shuffle, seed, as_dict)


class PseudoLabelDataset(IterableDataset[Any]):
    """See `PseudoLabels.dataset`. Iterating raises DataError for damaged data, StorageError when reading fails."""

    def __init__(
        self, source: Source, transform: Callable[[Image.Image], Any] | None, shuffle: int, seed: int, as_dict: bool
    ) -> None:
        self._source, self._transform, self._as_dict = source, transform, as_dict
        self._shuffle, self._seed = shuffle, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared with persistent workers
        self._rank = (0, 1)

    def set_epoch(self, epoch: int) -> None:
        """Change the order for this epoch; call it on all ranks. Otherwise all epochs have the same order."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        part, parts = _part_of(*self._distributed())
        order = np.arange(self._source.num_shards)
        random = np.random.default_rng([self._seed, int(self._epoch)])  # the same for all parts
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
        return {"image": image} | {name: getattr(sample, name) for name in ("key", "label", "confidence", "copies")}

    def _distributed(self) -> tuple[int, int]:
        """Rank and world size; in a loader worker, those of the process that made the loader."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return self._rank

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rank": self._distributed()}


def _part_of(rank: int, world_size: int) -> tuple[int, int]:
    """The part of the shards that this process reads, and the number of parts."""
    worker = get_worker_info()
    number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
    return rank * workers + number, world_size * workers


def _mixed(samples: Iterator[PseudoLabeled], size: int, random: np.random.Generator) -> Iterator[PseudoLabeled]:
    """Shuffle samples with a buffer of `size`."""
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
    """Open the source, whichever kind it is."""
    if is_http(source):
        return open_served(source, keep, token)
    if token is not None:
        raise DataError(f"token: {redacted(source)} is no http:// or https:// address; expected no token")
    if storage.exists(storage.join(source, CONFIG_NAME)):
        return open_run(source, keep)
    if storage.exists(latest := storage.join(source, LATEST_NAME)):
        source = storage.join(source, read_pointer(latest))
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        return open_exported(source, keep)
    raise DataError(
        f"{redacted(source)}: expected a run directory ({CONFIG_NAME}), an export ({MANIFEST_NAME}), a folder of exports "
        f"({LATEST_NAME}), or the http:// address of stage=serve"
    )


def _check_filter(keep: RowFilter, class_names: tuple[str, ...] | None) -> None:
    """Raise DataError for a filter with impossible values."""
    if not 0 <= keep.min_confidence <= 1:
        raise DataError(f"min_confidence={keep.min_confidence}: expected 0 to 1")
    num_classes = len(class_names) if class_names else 1 << 31
    if keep.classes is not None and (bad := [c for c in sorted(keep.classes) if not 0 <= c < num_classes]):
        raise DataError(f"classes: {bad[0]}: expected class numbers from 0 to {num_classes - 1}")
