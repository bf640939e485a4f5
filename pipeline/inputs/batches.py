"""Training batches by step number: images of all streams in exact counts, decoded and augmented, with their targets.

    Stream (inputs.streams) ──► bytes ──► decode ──► augment ──► batch

A batch is a function of (seed, step, rank, world size). Resuming at step n makes batch n; nothing before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset

from data.errors import DataError
from data.images.decode import DecodeError
from data.training_order import Order, OrderSlice
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

    def order(self, stream: int) -> Order:
        """The order of one stream, over all ranks."""
        return self._streams[stream].order

    def __getitem__(self, step: int) -> TrainBatch:
        """The batch of a step.

        Raises:
            DataError: an image cannot be decoded, or a shard has changed; the message names shard and key.
        """
        of_rank = slice(self._rank, None, self._world)
        parts = [(number, stream.entries(step).take(of_rank)) for number, stream in enumerate(self._streams)]
        targets = SparseTargets.concatenate([self._streams[number].targets(entries) for number, entries in parts])
        samples = [sample for number, entries in parts for sample in self._samples(number, entries)]
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
        for stream in self._streams:
            stream.reader.close()

    def _samples(self, number: int, entries: OrderSlice) -> Iterator[tuple[torch.Tensor, Noise]]:
        """Images of one stream, uint8 (3, S, S), and the noise that is not added yet."""
        stream = self._streams[number]
        for entry in entries.tuples():
            _, shard, row, _ = entry
            content = stream.reader.image(shard, stream.rows(shard).place(row))
            try:
                yield self._transform.from_file(content, sample_seed(self._seed, number, *entry))
            except DecodeError as error:
                raise DataError(f"{stream.describe(shard, row)}: {error}; repair or remove the image") from error
