"""Training batches by step number: images of all streams in exact counts, decoded and augmented, with their targets.

    Stream (inputs.streams) ──► bytes ──► decode ──► augment ──► batch

A batch is a function of (seed, step, rank, world size). Resuming at step n makes batch n; nothing before it is read. Images of remote
shards are read before their turn, many at once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, tee

import numpy as np
import torch
from torch.utils.data import Dataset

from data.errors import DataError
from data.images.decode import DecodeError
from data.training_order import Order, OrderSlice
from pipeline.core.schema import TrainConfig
from pipeline.inputs.noise import Noise
from pipeline.inputs.streams import Stream, StreamSpec
from pipeline.inputs.targets import SparseTargets
from pipeline.inputs.train_transform import make_views, view_seeds


@dataclass
class TrainBatch:
    """Images uint8 (N, 3, S, S), or with several views of each (N, views, 3, S, S), and their targets.

    Attributes:
        targets: `targets.dense` makes these float32 (N, C); None for streams without targets.
        noise: still to be added to each view, image by image; None: it has been added.
        positions: of a piece, where its images are in the batch, int (N,); None: this is the whole batch.
    """

    images: torch.Tensor
    targets: SparseTargets | None
    noise: list[Noise] | None = None
    positions: np.ndarray | None = None

    def pin_memory(self) -> TrainBatch:
        """Called by torch's loader, before a copy to a GPU. Pieces are pinned when they are joined."""
        return self if self.positions is not None else replace(self, images=self.images.pin_memory())


_Piece = tuple[int, int, int]  # step, number of the piece, pieces of the step's batch
_Entry = tuple[int, int, int, int]  # epoch, shard, row, copy


class TrainBatches(Dataset[TrainBatch]):
    """This rank's batch of every step: `images_per_step / world_size` images of each stream, in the order of the streams.

    Attributes:
        num_images: in a batch.
        image_bytes: of all views of an image in a batch.
    """

    def __init__(
        self,
        specs: Sequence[StreamSpec],
        config: TrainConfig,
        num_classes: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open the streams, which have equally many views. Raises DataError: a selection is not what was committed."""
        self._seed, self._rank = seed, rank
        self._streams = [Stream(spec, num_classes, config.label_smoothing, seed) for spec in specs]
        self._transform = make_views(config)
        self._noise_later = config.augment_on == "device"
        (self._views,) = {spec.views for spec in specs}
        self.image_bytes = self._views * math.prod(config.view_shape)
        self.num_images = sum(len(range(rank, spec.images_per_step, world_size)) for spec in specs)
        self.world_size = world_size
        self._process = os.getpid()
        self._expected: Iterable[_Piece] = ()
        self._upcoming: Iterator[_Piece] = iter(())  # those whose images are being read
        self._images: list[Iterator[tuple[_Entry, bytes]]] = []  # of these, per stream
        self._entries: dict[_Piece, tuple[np.ndarray | None, list[OrderSlice]]] = {}  # of these

    def order(self, stream: int) -> Order:
        """The order of one stream, over all ranks."""
        return self._streams[stream].order

    def expect(self, pieces: Iterable[_Piece]) -> None:
        """Tell which pieces (step, number, pieces) this process is asked for next, in order, so that their images are read ahead."""
        self._expected = pieces

    def __getitem__(self, step: int) -> TrainBatch:
        """The batch of a step. Raises as `piece`."""
        return self.piece(step)

    def piece(self, step: int, number: int = 0, pieces: int = 1) -> TrainBatch:
        """One of `pieces` about equal pieces of a step's batch; see `inputs.pieces`.

        Raises:
            DataError: an image cannot be decoded, or a shard has changed; the message names shard and key.
        """
        piece = step, number, pieces
        upcoming, self._upcoming = self._upcoming, iter(())  # after an error, begin anew
        if next(upcoming, None) != piece or self._process != os.getpid():
            upcoming = self._begin(piece)
        positions, entries = self._entries_of(piece)
        parts = [(stream, part) for stream, part in enumerate(entries) if len(part)]
        targets = [of_part for stream, part in parts if (of_part := self._streams[stream].targets(part)) is not None]
        samples = [sample for stream, part in parts for sample in self._samples(stream, len(part))]
        del self._entries[piece]
        self._upcoming = upcoming
        images, noise = [image for image, _ in samples], [noise for _, noise in samples]
        if not self._noise_later:
            images = [self._transform.add_noise(*each) for each in samples]
        pixels = torch.stack(images)
        return TrainBatch(
            pixels if self._views == 1 else pixels.unflatten(0, (-1, self._views)),
            SparseTargets.concatenate(targets) if targets else None,
            noise if self._noise_later else None,
            positions,
        )

    def keys(self, step: int) -> list[str]:
        """Shard and key of each image of a step's batch, over all ranks; no image is read."""
        found = []
        for stream in self._streams:
            entries = stream.entries(step)
            found += [stream.describe(int(s), int(r)) for s, r in zip(entries.shard, entries.row, strict=True)]
        return found

    def close(self) -> None:
        """Close this process's open files."""
        self._upcoming, self._images = iter(()), []
        for stream in self._streams:
            stream.reader.close()

    def _begin(self, piece: _Piece) -> Iterator[_Piece]:
        """Begin to read the images of a piece and of those expected after it; the latter."""
        self._process = os.getpid()
        self._entries.clear()
        expected, self._expected = iter(self._expected), ()
        after = expected if next(expected, None) == piece else iter(())
        upcoming, *of_streams = tee(after, 1 + len(self._streams))
        self._images = [self._read(number, chain([piece], pieces)) for number, pieces in enumerate(of_streams)]
        return upcoming

    def _read(self, number: int, pieces: Iterator[_Piece]) -> Iterator[tuple[_Entry, bytes]]:
        """This rank's images of one stream, piece by piece."""
        stream = self._streams[number]

        def entries() -> Iterator[list[_Entry]]:
            for piece in pieces:
                part = self._entries_of(piece)[1][number]
                stream.load(part.shard)
                yield list(part.tuples())

        return stream.reader.read_ahead(entries(), lambda entry: (entry[1], stream.rows(entry[1]).place(entry[2])))

    def _entries_of(self, piece: _Piece) -> tuple[np.ndarray | None, list[OrderSlice]]:
        """Positions of a piece in this rank's batch (None: it is the whole), and its entries of each stream."""
        if piece not in self._entries:
            step, number, pieces = piece
            of_rank = slice(self._rank, None, self.world_size)
            entries = [stream.entries(step).take(of_rank) for stream in self._streams]
            self._entries[piece] = (None, entries) if pieces == 1 else _cut(entries, number, pieces)
        return self._entries[piece]

    def _samples(self, number: int, count: int) -> Iterator[tuple[torch.Tensor, Noise]]:
        """The views of the next images of one stream, uint8 (3, S, S), and the noise that is not added yet."""
        stream = self._streams[number]
        for entry, content in islice(self._images[number], count):
            try:
                yield from self._transform.views(content, view_seeds(self._views, self._seed, number, *entry))
            except DecodeError as error:
                raise DataError(f"{stream.describe(*entry[1:3])}: {error}; repair or remove the image") from error


def _cut(streams: Sequence[OrderSlice], number: int, pieces: int) -> tuple[np.ndarray, list[OrderSlice]]:
    """Piece `number` of a batch: its positions in the batch, ascending by stream, shard and row, and its entries of each stream.

    Cut by shard, because each process reads the table of every shard in its pieces.
    """
    ends = np.cumsum([len(entries) for entries in streams])
    shard, row = (np.concatenate([getattr(entries, name) for entries in streams]) for name in ("shard", "row"))
    stream = np.repeat(np.arange(len(streams)), [len(entries) for entries in streams])
    positions = np.array_split(np.lexsort((row, shard, stream)), pieces)[number]
    starts = ends - [len(entries) for entries in streams]
    parts = [positions[stream[positions] == n] - start for n, start in enumerate(starts)]
    return positions, [entries.take(part) for entries, part in zip(streams, parts, strict=True)]
