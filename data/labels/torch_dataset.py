"""Pseudo-labels as a dataset for torch's DataLoader. The only module of pseudo-labels that imports torch.

Ranks (torch.distributed) and loader workers divide the shards: each sample appears once per epoch. Shares differ in size, so ranks that
synchronize must stop after the same number of steps or use torch's `Join`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .sources import PseudoLabeled, Source

logger = logging.getLogger(__name__)


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
        picture = sample.decoded()
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
