"""Predict pieces of images with labeling's batches: read and decoded ahead of the model, and never stopping between two pieces."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import pyarrow as pa

from data.labels.top_k import TopK
from data.progress_bar import ProgressBar
from data.shards.image_reader import Place
from pipeline.prediction.inputs import Piece, Reasons
from pipeline.prediction.parts import Parts
from pipeline.prediction.tables import as_rows
from teacher.labeling.batches import ImageBatch, Meter, View
from teacher.labeling.crash_isolation import crashing_images
from teacher.labeling.label_shard import BatchLabeler

_ON_THEIR_WAY = 6  # batches of later pieces, at most, that are read before a piece is done
_PATIENCE_S = 150.0  # to decode one image in a process of its own
NOTHING_CRASHES: Mapping[int, Mapping[int, str]] = MappingProxyType({})


@dataclass(frozen=True)
class _Work:
    """What predicts, and what is known of the images on their way.

    Attributes:
        paths: of the batches that are read and not yet predicted, oldest first.
        crashing: of pieces by their position, see `crashing_images_of`.
        unreadable: reasons by path.
    """

    labeler: BatchLabeler
    batch_size: int
    crashing: Mapping[int, Mapping[int, str]]
    paths: deque[list[str]] = field(default_factory=deque)
    unreadable: Reasons = field(default_factory=dict)

    def batches(self, pieces: Sequence[Piece]) -> Generator[ImageBatch, None, None]:
        """Read the pieces as batches. No batch has images of two, so that a piece is the same whatever was done before."""
        for number, piece in enumerate(pieces):
            with piece.open(self.unreadable) as images:
                crashing = self.crashing.get(number, {})
                problems = [crashing.get(row, problem) for row, problem in enumerate(images.problems)]
                for start in range(0, len(piece), self.batch_size):
                    rows = slice(start, start + self.batch_size)
                    places = images.places[rows]
                    batch = self.labeler.reader.read(images.read, places, problems[rows])
                    self.paths.append([place.key for place in places])
                    yield batch

    def rows(self, batch: ImageBatch, top_k: TopK | None) -> pa.Table:
        """The rows of the oldest batch."""
        paths = self.paths.popleft()
        reasons = [
            self.unreadable.pop(path, problem) if problem else ""
            for path, problem in zip(paths, batch.problems, strict=True)
        ]
        return as_rows(paths, reasons, top_k)


def crashing_images_of(todo: Sequence[Piece], batch_size: int, view: View) -> dict[int, dict[int, str]]:
    """The images that end or hang a process, of the pieces that were on their way when a process was lost.

    Returns:
        Position in `todo` → row → reason.
    """
    suspects, batches = 1, 0
    while suspects < len(todo) and batches < _ON_THEIR_WAY:
        batches += math.ceil(len(todo[suspects]) / batch_size)
        suspects += 1
    return {
        position: crashing_images("images", len(piece), partial(_open, piece), view, _PATIENCE_S, Meter())
        for position, piece in enumerate(todo[:suspects])
    }


@contextmanager
def _open(piece: Piece) -> Iterator[tuple[Sequence[Place], Callable[[Place], bytes]]]:
    with piece.open({}) as images:
        yield images.places, lambda place: images.read([place])[0]


def predict_pieces(
    labeler: BatchLabeler,
    batch_size: int,
    parts: Parts,
    todo: Sequence[Piece],
    number: int,
    crashing: Mapping[int, Mapping[int, str]] = NOTHING_CRASHES,
) -> None:
    """Predict pieces in order and commit each when its last batch is done, while the next ones are read and decoded.

    Args:
        batch_size: of the labeler's predictor.
        todo: pieces that are not done.
        number: of all images, done ones included.
        crashing: images that are not decoded, see `crashing_images_of`.

    Raises:
        DataError: a shard has changed.
        StorageError: an object store does not answer.
        StageError: the weights are damaged.
    """
    work = _Work(labeler, batch_size, crashing)
    done = number - sum(map(len, todo))
    if done:
        print(f"{done:,} of {number:,} images are predicted already")
    bar = ProgressBar(total=number, initial=done, desc="predict", unit="image")
    with closing(work.labeler.labeled(work.batches(todo))) as labeled, bar:
        for piece in todo:
            rows: list[pa.Table] = []
            while sum(table.num_rows for table in rows) < len(piece):
                rows.append(work.rows(*next(labeled)))
                bar.update(rows[-1].num_rows)
            parts.write(piece, rows)
