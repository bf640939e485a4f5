"""Plan the files of an export: which label rows go into which file. A function of the selection alone, computed piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.labels.label_files import read_labels
from data.labels.overlay import Overlay, RowFilter
from data.training_order import Order
from pipeline.core.schema import Config, ExportConfig
from pipeline.core.stage import StageError

EXTENSIONS = {"parquet": "parquet", "columns": "tar", "csv": "csv"}  # of labels without images, by export.format
_PIECE = 100_000  # rows planned together


@dataclass(frozen=True, eq=False)
class RowRefs:
    """References to label rows, in the order of the export; int64 [n] each."""

    shard: np.ndarray  # position of the unlabeled shard
    row: np.ndarray  # in its label file
    copy: np.ndarray  # which copy of the image, from 0

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def concatenate(parts: Sequence[RowRefs]) -> RowRefs:
        """Join parts in order."""
        return RowRefs(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("shard", "row", "copy")))

    def slice(self, start: int, stop: int) -> RowRefs:
        """Return rows `start` to `stop`."""
        return RowRefs(self.shard[start:stop], self.row[start:stop], self.copy[start:stop])


@dataclass(frozen=True, eq=False)
class ExportFile:
    """A file to write.

    Attributes:
        rows: label rows with their images; or, for labels without images, the position of the unlabeled shard.
    """

    name: str
    num_samples: int
    rows: RowRefs | int


def plan_files(config: Config, overlay: Overlay) -> tuple[Iterator[ExportFile], int]:
    """Return all files, in order, and the number of samples in them. Raises StageError when nothing is selected."""
    counts = [_num_written(config.export, overlay, position) for position in range(len(overlay.shards))]
    totals = [int(count.sum(dtype=np.int64)) for count in counts]
    if not sum(totals):
        raise StageError(
            "stage=export: nothing is selected; run stage=select with a lower threshold, or set export.selected=false"
        )
    if config.export.format == "shards":
        return _image_shards(config, overlay, counts), sum(totals)
    if config.export.format == "columns":  # has left-out samples too, with the reason
        totals = [shard.num_samples for shard in overlay.shards]
    extension = EXTENSIONS[config.export.format]
    files = (ExportFile(f"{overlay.shards[at].name}.{extension}", total, at) for at, total in enumerate(totals))
    return files, sum(totals)


def _num_written(config: ExportConfig, overlay: Overlay, position: int) -> np.ndarray:
    """Return how often each label row of a shard is written, uint16 [rows]."""
    copies, wanted = overlay.copies(position), overlay.wanted(position, RowFilter(config.selected))
    counts = np.zeros_like(copies)
    counts[wanted] = np.maximum(copies[wanted], 1) if config.repeats == "written" else 1
    return counts


def _image_shards(config: Config, overlay: Overlay, counts: Sequence[np.ndarray]) -> Iterator[ExportFile]:
    num_mixed = config.export.shuffle_shards
    pieces = _shuffled(counts, config.seed, num_mixed) if num_mixed else _in_shard_order(counts)
    parts = _split(pieces, config.export.samples_per_shard, config.export.bytes_per_shard, _image_sizes(overlay))
    for number, part in enumerate(parts):
        yield ExportFile(f"pseudo-{number:06d}.tar", len(part), part)


def _in_shard_order(counts: Sequence[np.ndarray]) -> Iterator[RowRefs]:
    """Yield all rows in the order of the unlabeled shards, a row's copies in succession.

    Args:
        counts: per unlabeled shard, how often each row is written, int [rows].
    """
    for position, repeats in enumerate(counts):
        row = np.repeat(np.arange(len(repeats)), repeats)
        first = np.repeat(np.cumsum(repeats, dtype=np.int64) - repeats, repeats)
        yield RowRefs(np.full(len(row), position), row, np.arange(len(row)) - first)


def _shuffled(counts: Sequence[np.ndarray], seed: int, num_mixed: int) -> Iterator[RowRefs]:
    """Yield all rows in random order, mixed within `num_mixed` unlabeled shards, a row's copies far apart (`data.training_order`)."""
    order = Order(counts, seed, "export", num_mixed)
    for start in range(0, order.num_entries, _PIECE):
        entries = order.take(start, min(_PIECE, order.num_entries - start))
        yield RowRefs(entries.shard, entries.row, entries.copy)


def _split(
    pieces: Iterable[RowRefs],
    max_rows: int,
    max_bytes: int | None,
    sizes: Callable[[RowRefs], np.ndarray],
) -> Iterator[RowRefs]:
    """Yield the rows in the same order, in parts of at most `max_rows` rows and `max_bytes` bytes of images, at least one row each.

    Args:
        sizes: image sizes of rows in bytes, int [n]; called only with `max_bytes`.
    """
    held: list[RowRefs] = []
    for piece in pieces:
        rest = RowRefs.concatenate([*held, piece])
        while (end := _first_part_end(rest, max_rows, max_bytes, sizes)) < len(rest):
            yield rest.slice(0, end)
            rest = rest.slice(end, len(rest))
        held = [rest]
    if held and len(held[0]):
        yield held[0]


def _first_part_end(rows: RowRefs, max_rows: int, max_bytes: int | None, sizes: Callable[[RowRefs], np.ndarray]) -> int:
    if max_bytes is None or len(rows) == 0:
        return min(max_rows, len(rows))
    ends = np.cumsum(sizes(rows.slice(0, max_rows)), dtype=np.int64)
    return min(max_rows, max(1, int(np.searchsorted(ends, max_bytes, side="right"))))


def _image_sizes(overlay: Overlay) -> Callable[[RowRefs], np.ndarray]:
    """Return a function: rows → image sizes in bytes, int64 [n]. It reads each label file once."""
    read: dict[int, np.ndarray] = {}

    def sizes(rows: RowRefs) -> np.ndarray:
        found = np.empty(len(rows), np.int64)
        for position in np.unique(rows.shard).tolist():
            if position not in read:
                committed = overlay.committed.get(overlay.shards[position].name)
                labels = read_labels(overlay.files(position)[0], ["size"], committed)
                read[position] = labels.column("size").to_numpy().astype(np.uint32)
            found[rows.shard == position] = read[position][rows.row[rows.shard == position]]
        return found

    return sizes
