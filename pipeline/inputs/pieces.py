"""A step's batch in pieces, so that what the loading processes hold in shared memory is bounded in bytes.

    batch ── cut by shard ──► pieces, loaded by several processes ──► joined in the trainer ──► the same batch

2,048 images of 224 px are 308 MB; twelve processes that each load four such batches ahead would hold 15 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pipeline.inputs.batches import TrainBatch
from pipeline.inputs.targets import SparseTargets

AHEAD = 4  # pieces that each process loads ahead
MAX_SHARED = 750_000_000  # bytes of shared memory for the pieces of one training process


def num_pieces(num_images: int, image_bytes: int, num_workers: int, max_bytes: int) -> int:
    """The fewest pieces of a batch such that all in flight take at most `max_bytes`; at most one per image."""
    per_piece = max(1, max_bytes // shared_memory_needed(image_bytes, num_workers))
    return -(-num_images // per_piece)


def shared_memory_needed(piece_bytes: int, num_workers: int) -> int:
    """Bytes of all pieces in flight: those that `num_workers` processes load ahead, and the one that the trainer has."""
    return piece_bytes * (AHEAD * num_workers + 1)


class Joiner:
    """Puts pieces together, copying each at once, so that its shared memory is free again."""

    def __init__(self, pieces: int, num_images: int, pin: bool) -> None:
        self._pieces, self._num_images, self._pin = pieces, num_images, pin
        self._parts: list[TrainBatch] = []
        self._images = torch.empty(0, dtype=torch.uint8)

    def add(self, piece: TrainBatch) -> Iterator[TrainBatch]:
        """Yield the batch if this is its last piece."""
        if piece.positions is None:
            yield piece
            return
        if not self._parts:
            shape = (self._num_images, *piece.images.shape[1:])
            self._images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin)
        self._images.numpy()[piece.positions] = piece.images.numpy()
        self._parts.append(replace(piece, images=self._images))
        if len(self._parts) == self._pieces:
            yield self._join()

    def _join(self) -> TrainBatch:
        parts, self._parts = self._parts, []
        order = np.argsort(np.concatenate([part.positions for part in parts]))
        targets = [part.targets for part in parts if part.targets is not None]
        noise = [each for part in parts for each in part.noise or ()]
        views = len(noise) // len(order)  # of each image
        images, self._images = self._images, torch.empty(0, dtype=torch.uint8)
        return TrainBatch(
            images,
            SparseTargets.concatenate(targets).take(order) if targets else None,
            [noise[at * views + view] for at in order for view in range(views)] if noise else None,
        )
