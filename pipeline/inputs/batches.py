"""Training batches by step number: images of all streams in exact counts, decoded and augmented, with their targets.

    Stream (inputs.streams) ──► bytes ──► decode ──► augment ──► batch

A batch is a function of (seed, step, rank, world size). Resuming at step n makes batch n; nothing before it is read. Images of remote
shards are read before their turn, many at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from data.errors import DataError
from data.images.decode import DecodeError
from data.shards.image_reader import Place
from data.training_order import Order
from pipeline.core.schema import TrainConfig
from pipeline.inputs.noise import Noise
from pipeline.inputs.streams import Stream, StreamSpec
from pipeline.inputs.train_transform import make_transform, sample_seed


@dataclass
class TrainBatch:
    """Images uint8 (N, 3, S, S), targets float32 (N, C), and shard and key of each image (tests compare batches by them).

    `noise` is still to be added to each image; None: it has been added.
    """

    images: torch.Tensor
    targets: torch.Tensor
    keys: list[str]
    noise: list[Noise] | None = None

    def pin_memory(self) -> TrainBatch:
        """Called by torch's loader, before a copy to a GPU."""
        return TrainBatch(self.images.pin_memory(), self.targets.pin_memory(), self.keys, self.noise)


class _Entry(NamedTuple):
    """An image of a stream, and its place."""

    epoch: int
    shard: int
    row: int
    copy: int
    place: Place


class _Sample(NamedTuple):
    image: torch.Tensor  # uint8 (3, S, S)
    noise: Noise  # not added yet
    target: np.ndarray  # float32 (C,)
    key: str


class TrainBatches(Dataset[TrainBatch]):
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
        """Open the streams. Raises DataError: a selection is not what was committed."""
        self._seed, self._rank, self._world = seed, rank, world_size
        self._streams = [Stream(spec, num_classes, config.label_smoothing, seed) for spec in specs]
        self._transform = make_transform(config)
        self._noise_later = config.augment_on == "device"
        self._expected: Sequence[int] = ()
        self._reading: Iterator[int] = iter(())  # steps whose images are being read
        self._images: list[Iterator[tuple[_Entry, bytes]]] = []  # of these steps, per stream
        self._process = os.getpid()

    def order(self, stream: int) -> Order:
        """The order of one stream, over all ranks."""
        return self._streams[stream].order

    def expect(self, steps: Sequence[int]) -> None:
        """Tell which steps this process will be asked for next, in this order, so that their images are read ahead."""
        self._expected = steps

    def __getitem__(self, step: int) -> TrainBatch:
        """The batch of a step.

        Raises:
            DataError: an image cannot be decoded, or a shard has changed; the message names shard and key.
        """
        reading, self._reading = self._reading, iter(())  # after an error, begin anew
        if next(reading, None) != step or self._process != os.getpid():
            reading = self._begin(step)
        samples = [sample for number in range(len(self._streams)) for sample in self._samples(number)]
        self._reading = reading
        noise = [sample.noise for sample in samples]
        images = [sample.image for sample in samples]
        if not self._noise_later:
            images = [self._transform.add_noise(*each) for each in zip(images, noise, strict=True)]
        targets = torch.from_numpy(np.stack([sample.target for sample in samples]))
        keys = [sample.key for sample in samples]
        return TrainBatch(torch.stack(images), targets, keys, noise if self._noise_later else None)

    def keys(self, step: int) -> list[str]:
        """Shard and key of each image of a step's batch, over all ranks; no image is read."""
        found = []
        for stream in self._streams:
            entries = stream.entries(step)
            found += [stream.describe(int(s), int(r)) for s, r in zip(entries.shard, entries.row, strict=True)]
        return found

    def close(self) -> None:
        """Close this process's open files."""
        self._reading, self._images = iter(()), []
        for stream in self._streams:
            stream.reader.close()

    def _begin(self, step: int) -> Iterator[int]:
        """Begin to read the images of a step and of those expected after it; the latter."""
        steps = self._expected if step in self._expected[:1] else (step,)
        self._process = os.getpid()
        self._images = [stream.reader.read_ahead(self._entries(stream, steps), _place) for stream in self._streams]
        return iter(steps[1:])

    def _entries(self, stream: Stream, steps: Sequence[int]) -> Iterator[list[_Entry]]:
        """This rank's images of one stream, per step."""
        for step in steps:
            entries = stream.entries(step)
            columns = (entries.epoch, entries.shard, entries.row, entries.copy)
            images = zip(*(column[self._rank :: self._world].tolist() for column in columns), strict=True)
            yield [_Entry(e, s, row, copy, stream.rows(s).place(row)) for e, s, row, copy in images]

    def _samples(self, number: int) -> Iterator[_Sample]:
        """This rank's next samples of one stream, as many as a step has."""
        stream = self._streams[number]
        count = len(range(self._rank, stream.spec.images_per_step, self._world))
        for (epoch, shard, row, copy, _), content in islice(self._images[number], count):
            key, seed = stream.describe(shard, row), sample_seed(self._seed, number, epoch, shard, row, copy)
            try:
                image, noise = self._transform.from_file(content, seed)
            except DecodeError as error:
                raise DataError(f"{key}: {error}; repair or remove the image") from error
            yield _Sample(image, noise, stream.rows(shard).targets[row], key)


def _place(entry: _Entry) -> tuple[int, Place]:
    return entry.shard, entry.place
