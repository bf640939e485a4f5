"""Training batches by step number: images of all streams in exact counts, decoded and augmented, with their targets.

    Stream (inputs.streams) ──► bytes ──► decode ──► augment ──► batch

A batch is a function of (seed, step, rank, world size). Resuming at step n makes batch n; nothing before it is read. Images of remote
shards are read before their turn, many at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.utils.data import Dataset

from data.errors import DataError
from data.images.decode import DecodeError
from data.training_order import Order
from pipeline.core.schema import TrainConfig
from pipeline.inputs.noise import Noise
from pipeline.inputs.streams import Stream, StreamSpec
from pipeline.inputs.targets import SparseTargets
from pipeline.inputs.train_transform import make_transform, sample_seed


@dataclass
class TrainBatch:
    """Images uint8 (N, 3, S, S) and their targets; `dense` makes these float32 (N, C).

    `noise` is still to be added to each image; None: it has been added.
    """

    images: torch.Tensor
    targets: SparseTargets
    noise: list[Noise] | None = None

    def pin_memory(self) -> TrainBatch:
        """Called by torch's loader, before a copy to a GPU."""
        return replace(self, images=self.images.pin_memory())


_Entry = tuple[int, int, int, int]  # epoch, shard, row, copy


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
        self._seed = seed
        self._streams = [Stream(spec, num_classes, config.label_smoothing, seed) for spec in specs]
        self._transform = make_transform(config)
        self._noise_later = config.augment_on == "device"
        self._of_rank = slice(rank, None, world_size)
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
        parts = [(number, stream.entries(step).take(self._of_rank)) for number, stream in enumerate(self._streams)]
        targets = SparseTargets.concatenate([self._streams[number].targets(entries) for number, entries in parts])
        samples = [sample for number, entries in parts for sample in self._samples(number, len(entries))]
        self._reading = reading
        images, noise = [image for image, _ in samples], [noise for _, noise in samples]
        if not self._noise_later:
            images = [self._transform.add_noise(*each) for each in samples]
        return TrainBatch(torch.stack(images), targets, noise if self._noise_later else None)

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
        self._images = [self._read(stream, steps) for stream in self._streams]
        return iter(steps[1:])

    def _read(self, stream: Stream, steps: Sequence[int]) -> Iterator[tuple[_Entry, bytes]]:
        """This rank's images of one stream, step by step."""
        entries = (list(stream.entries(step).take(self._of_rank).tuples()) for step in steps)
        return stream.reader.read_ahead(entries, lambda entry: (entry[1], stream.rows(entry[1]).place(entry[2])))

    def _samples(self, number: int, count: int) -> Iterator[tuple[torch.Tensor, Noise]]:
        """The next images of one stream, uint8 (3, S, S), and the noise that is not added yet."""
        stream = self._streams[number]
        for entry, content in islice(self._images[number], count):
            try:
                yield self._transform.from_file(content, sample_seed(self._seed, number, *entry))
            except DecodeError as error:
                raise DataError(f"{stream.describe(*entry[1:3])}: {error}; repair or remove the image") from error
