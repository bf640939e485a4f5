"""The labeled splits of a run and their classes, for every stage that trains on them or measures with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.shards.image_reader import check_labeled
from data.shards.split import Split, open_split
from pipeline.core.layout import Layout
from pipeline.core.schema import Config
from pipeline.core.stage import StageError, done_record
from pipeline.stages import StageRow, fields_in_force, with_folder
from pipeline.upstream.stage_inputs import require_same_classes

Counts = NDArray[np.int64]  # (num_classes,)
_SHOWN = 5  # class names in a message


def open_labeled(config: Config, layout: Layout) -> tuple[Split | None, Split | None]:
    """Open data.labeled and data.validation; None for one that is not configured. Raises StageError when their classes differ."""
    labeled = open_split(config.data.labeled, layout.indexes) if config.data.labeled else None
    validation = open_split(config.data.validation, layout.indexes) if config.data.validation else None
    if labeled and validation:
        require_same_classes(labeled.class_names, "data.labeled", validation.class_names, "data.validation")
    return labeled, validation


def classes_of(config: Config, split: Split | None) -> tuple[int, tuple[str, ...] | None]:
    """The number of classes, and their names or None when no manifest has them.

    Raises StageError when neither a manifest nor data.num_classes gives the number.
    """
    names = split.class_names if split else None
    number = config.data.num_classes or (len(names) if names else None)
    if number is None:
        raise StageError("data.num_classes is needed: the labeled shards have no manifest with class names")
    if names and len(names) != number:
        raise StageError(f"data.num_classes={number}, but the labeled shards' manifest has {len(names)} class names")
    return number, names


def splits_to_check(config: Config, layouts: Sequence[Layout], stages: Sequence[str]) -> list[str]:
    """Labeled splits that are configured and that a command will train or measure on in a stage that is not done."""
    wanted: set[str] = set()
    running: set[str] = set()
    for row in with_folder():
        own = layouts[:1] if row.only_first or row.once else layouts
        is_done = all(done_record(layout.folder_of(row.name)) is not None for layout in own)
        if row.name in stages and (not is_done or running & {*row.upstream.values()}):
            running.add(row.name)
            wanted.update(_splits_for_learning(config, row))
    return [name for name in ("labeled", "validation", "test") if name in wanted and getattr(config.data, name)]


def _splits_for_learning(config: Config, row: StageRow) -> set[str]:
    """Labeled splits of a stage that trains on data.labeled or measures on data.test."""
    read = set(fields_in_force(row.reads, config))
    return {field.removeprefix("data.") for field in read} if read & {"data.labeled", "data.test"} else set()


def check_splits(config: Config, splits: Mapping[str, Split]) -> list[str]:
    """Check, before anything is computed, that the splits have the same classes and every image has a valid label.

    Args:
        splits: any of `labeled`, `validation`, `test`.

    Returns:
        Sentences that name classes without images.

    Raises:
        StageError: the classes differ.
        DataError: all labeled images are of one class, or a sample has a problem, no label, or a label out of range.
    """
    names = list(splits)
    for other in names[1:]:
        require_same_classes(
            splits[names[0]].class_names, f"data.{names[0]}", splits[other].class_names, f"data.{other}"
        )
    known = next((split for split in splits.values() if split.class_names), None)
    if known is None and config.data.num_classes is None:
        return []  # the stages raise for want of data.num_classes
    num_classes, class_names = classes_of(config, known)
    notes: list[str] = []
    for name, split in splits.items():
        notes += _describe(name, _count(split, num_classes), class_names)
    return notes


def _count(split: Split, num_classes: int) -> Counts:
    """Count the images per class. On a bad sample call `check_labeled`, which is slower and raises a DataError that names it."""
    counts = np.zeros(num_classes, np.int64)
    for shard, table in zip(split.shards, split.indexes(), strict=True):
        labels = table.column("label").drop_null().to_numpy()
        is_valid = len(labels) == table.num_rows and not any(table.column("problem").to_pylist())
        is_valid = is_valid and not shard.findings.stray
        if not is_valid or (len(labels) and not 0 <= labels.min() <= labels.max() < num_classes):
            check_labeled(split, num_classes)
        counts += np.bincount(labels, minlength=num_classes)
    return counts


def _describe(name: str, counts: Counts, class_names: Sequence[str] | None) -> Iterator[str]:
    missing = np.flatnonzero(counts == 0).tolist()
    if name == "labeled" and len(counts) - len(missing) < 2:
        raise DataError(
            f"data.labeled: all {counts.sum():,} images are of one class; to train a classifier, two classes or more are needed"
        )
    if missing:
        some = ", ".join(class_names[label] if class_names else str(label) for label in missing[:_SHOWN])
        more = ", …" * (len(missing) > _SHOWN)
        yield f"data.{name} has no image of {len(missing):,} of {len(counts):,} classes: {some}{more}"
