"""Measure a run's data for its recipe, once, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from data import storage
from data.errors import DataError
from pipeline.core.config import Loaded
from pipeline.core.layout import Layout
from pipeline.core.recipes.recipe import Recipe
from pipeline.core.recipes.sizes import count_images, measure_sizes
from pipeline.upstream.required_files import require_inputs

_TRAINED_ON = {"pretrain", "teacher", "label", "student"}  # stages that read all images of a split


def follow_sizes(loaded: Loaded, stages: Sequence[str]) -> Loaded:
    """The configuration with the recipe's fields for the sizes of the data, unless the run directory remembers them.

    If it does, print where the data has other sizes now. Fields that wait for unlabeled images follow these once there are any.

    Raises:
        UsageError: shards do not exist, or there are no labeled images.
        DataError, StorageError: shards cannot be opened.
    """
    assert loaded.recipe is not None
    data, layout = loaded.config.data, Layout(loaded.config.run_dir, 1)
    known = loaded.recipe.sizes
    if known is None:
        require_inputs(loaded, stages)
        return loaded.with_sizes(measure_sizes(data.labeled, data.unlabeled, data.num_classes, layout.indexes))
    if not _TRAINED_ON & {*stages}:
        return loaded
    try:
        labeled, unlabeled = count_images(data.labeled, data.unlabeled, layout.indexes)
    except (DataError, storage.StorageError):  # the stages say so, if they need these shards
        return loaded
    if unlabeled and not known.unlabeled:
        return loaded.with_sizes(known.model_copy(update={"unlabeled": unlabeled}))
    if (labeled, unlabeled) != (known.labeled, known.unlabeled):
        print(_describe_change(loaded.recipe, labeled, unlabeled))
    return loaded


def _describe_change(recipe: Recipe, labeled: int, unlabeled: int) -> str:
    assert recipe.sizes is not None
    before, now = recipe.sizes, f"{labeled:,} labeled and {unlabeled:,} unlabeled images"
    return (
        f"recipe={recipe.name}: the data has {now} now. What follows their number stays as resolved for {before.labeled:,} and "
        f"{before.unlabeled:,}; another run_dir= resolves it again"
    )
