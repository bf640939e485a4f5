"""Predict pieces of images with labeling's batches: read and decoded ahead of the model, and never stopping between two pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import pyarrow as pa

from data.labels.top_k import TopK
from data.progress_bar import ProgressBar
from pipeline.prediction.inputs import Piece, Reasons
from pipeline.prediction.parts import Parts
from pipeline.prediction.tables import as_rows
from teacher.labeling.batches import ImageBatch
from teacher.labeling.label_shard import BatchLabeler


@dataclass(frozen=True)
class _Work:
    """What predicts, and what is known of the images on their way.

    Attributes:
        paths: of the batches that are read and not yet predicted, oldest first.
        unreadable: reasons by path.
    """

    labeler: BatchLabeler
    batch_size: int
    paths: deque[list[str]] = field(default_factory=deque)
    unreadable: Reasons = field(default_factory=dict)

    def batches(self, pieces: Sequence[Piece]) -> Generator[ImageBatch, None, None]:
        """Read the pieces as batches. No batch has images of two, so that a piece is the same whatever was done before."""
        for piece in pieces:
            with piece.open(self.unreadable) as images:
                for start in range(0, len(piece), self.batch_size):
                    rows = slice(start, start + self.batch_size)
                    places = images.places[rows]
                    batch = self.labeler.reader.read(images.read, places, images.problems[rows])
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


def predict_pieces(labeler: BatchLabeler, batch_size: int, parts: Parts, todo: Sequence[Piece], number: int) -> None:
    """Predict pieces in order and commit each when its last batch is done, while the next ones are read and decoded.

    Args:
        batch_size: of the labeler's predictor.
        todo: pieces that are not done.
        number: of all images, done ones included.

    Raises:
        DataError: a shard has changed.
        StorageError: an object store does not answer.
        StageError: the weights are damaged.
    """
    work = _Work(labeler, batch_size)
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
