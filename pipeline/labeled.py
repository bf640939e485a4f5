"""The labeled images of a run, for every stage that trains on them alone: their splits and their classes."""

from __future__ import annotations

from data.manifest import DataError, Split, open_split
from pipeline.fields import Config
from pipeline.layout import Layout
from pipeline.stage import StageError


def open_labeled(config: Config, layout: Layout) -> tuple[Split | None, Split | None]:
    """The labeled and the validation split, as far as they are configured."""
    labeled = open_split(config.data.labeled, layout.indexes) if config.data.labeled else None
    validation = open_split(config.data.validation, layout.indexes) if config.data.validation else None
    if labeled and validation and labeled.class_names != validation.class_names:
        raise DataError(
            "data.labeled and data.validation have different class names; pack both with the same class folders"
        )
    return labeled, validation


def classes_of(config: Config, split: Split | None) -> tuple[int, tuple[str, ...] | None]:
    """Number of classes, and their names where a manifest has them.

    Raises:
        StageError: neither a manifest nor data.num_classes tells.
    """
    names = split.class_names if split else None
    number = config.data.num_classes or (len(names) if names else None)
    if number is None:
        raise StageError("data.num_classes is needed: the labeled shards have no manifest with class names")
    if names and len(names) != number:
        raise StageError(f"data.num_classes={number}, but the labeled shards' manifest has {len(names)} class names")
    return number, names
