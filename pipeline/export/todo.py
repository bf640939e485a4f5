"""What an export is made of: its files, which rows each has, and how one is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data import storage
from data.labels.label_files import read_labels
from data.labels.overlay import Overlay, RowFilter
from data.shards.split import ShardRecord
from pipeline.core.schema import Config, ExportConfig
from pipeline.core.stage import StageError
from pipeline.export.plan import Part, cut, in_order, shuffled
from pipeline.export.shards import write_images
from pipeline.export.tables import EXTENSIONS, write_labels_alone


@dataclass(frozen=True, eq=False)
class File:
    """A file to make: rows with their images, or the labels alone of the unlabeled shard at a position."""

    name: str
    num_samples: int
    rows: Part | int


@dataclass(frozen=True)
class Job:
    """What all files are made from; plain data that travels to other processes."""

    overlay: Overlay
    config: ExportConfig
    folder: str


def make_file(job: Job, file: File) -> ShardRecord:
    """Write one file of the export. Raises DataError as `write_images` and `write_labels_alone`."""
    if isinstance(file.rows, Part):
        return write_images(job.overlay, file.rows, job.folder, file.name.removesuffix(".tar"))
    keep = RowFilter(selected=job.config.selected)
    return write_labels_alone(job.overlay, file.rows, keep, job.config.format, job.folder)


def files_of(config: Config, overlay: Overlay) -> tuple[Iterator[File], int]:
    """All files, in order, and the number of samples in them.

    Raises:
        StageError: nothing is selected.
    """
    counts = [_counts(config.export, overlay, position) for position in range(len(overlay.shards))]
    totals = [int(count.sum(dtype=np.int64)) for count in counts]
    if not sum(totals):
        raise StageError(
            "stage=export: nothing is selected; stage=select with a lower threshold, or export.selected=false"
        )
    if config.export.format == "shards":
        return _image_shards(config, overlay, counts), sum(totals)
    if config.export.format == "columns":  # they say why a sample is left out
        totals = [shard.num_samples for shard in overlay.shards]
    extension = EXTENSIONS[config.export.format]
    files = (File(f"{overlay.shards[at].name}.{extension}", total, at) for at, total in enumerate(totals))
    return files, sum(totals)


def _counts(config: ExportConfig, overlay: Overlay, position: int) -> np.ndarray:
    """How often each label row of a shard is written, uint16 [rows]."""
    copies, wanted = overlay.copies(position), overlay.wanted(position, RowFilter(config.selected))
    counts = np.zeros_like(copies)
    counts[wanted] = np.maximum(copies[wanted], 1) if config.repeats == "written" else 1
    return counts


def _image_shards(config: Config, overlay: Overlay, counts: Sequence[np.ndarray]) -> Iterator[File]:
    mixed = config.export.shuffle_shards
    pieces = shuffled(counts, config.seed, mixed) if mixed else in_order(counts)
    parts = cut(pieces, config.export.samples_per_shard, config.export.bytes_per_shard, _sizes(overlay))
    for number, part in enumerate(parts):
        yield File(f"pseudo-{number:06d}.tar", len(part), part)


def _sizes(overlay: Overlay) -> Callable[[Part], np.ndarray]:
    """Bytes of the images of some rows."""
    read: dict[int, np.ndarray] = {}

    def sizes(part: Part) -> np.ndarray:
        found = np.empty(len(part), np.int64)
        for position in np.unique(part.shard).tolist():
            if position not in read:
                name = overlay.shards[position].name
                url = storage.join(overlay.labels_dir, f"{name}.parquet")
                read[position] = (
                    read_labels(url, ["size"], overlay.committed.get(name)).column("size").to_numpy().astype(np.uint32)
                )
            found[part.shard == position] = read[position][part.row[part.shard == position]]
        return found

    return sizes
