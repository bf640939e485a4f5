"""The sizes of the data that a recipe follows: how many images, how many classes, how large the images are."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from statistics import median_low

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data.settings import UsageError
from data.shards.image_reader import ImageReader, places_in
from data.shards.split import Split, open_split

_MEASURED = 64  # labeled images whose headers are read for `side`


class Sizes(BaseModel):
    """What a recipe follows.

    Attributes:
        labeled, unlabeled: numbers of images; without unlabeled images 0.
        classes: their number; 0 if unknown.
        side: median of the shorter sides of labeled images, pixels; 0 if none of those read is an image.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labeled: int = Field(ge=1)
    unlabeled: int = Field(0, ge=0)
    classes: int = Field(0, ge=0)
    side: int = Field(0, ge=0)

    def describe(self) -> str:
        """`267 labeled and 5,411 unlabeled images, 9 classes, 72 px`"""
        parts = [f"{self.labeled:,} labeled and {self.unlabeled:,} unlabeled images"]
        parts += [f"{self.classes:,} classes"] if self.classes else []
        parts += [f"{self.side:,} px (median of the shorter sides)"] if self.side else []
        return ", ".join(parts)


def measure_sizes(
    labeled: Sequence[str], unlabeled: Sequence[str], num_classes: int | None, index_folder: str
) -> Sizes:
    """Measure the data behind shard patterns; writes only indexes of foreign shards.

    Args:
        num_classes: None: by the manifest, or else by the highest label.
        index_folder: see `open_split`.

    Raises:
        UsageError: there is no labeled image.
        DataError, StorageError: see `open_split`.
    """
    split = open_split(labeled, index_folder) if labeled else Split(())
    if not split.num_samples:
        raise UsageError(
            "data.labeled has no images, and a recipe follows their number; name their shards, or leave recipe= out"
        )
    others = open_split(unlabeled, index_folder).num_samples if unlabeled else 0
    classes = num_classes or len(split.class_names or ()) or _highest_label(split) + 1
    sides = sorted(_sides(split))
    return Sizes(labeled=split.num_samples, unlabeled=others, classes=classes, side=median_low(sides) if sides else 0)


def count_images(labeled: Sequence[str], unlabeled: Sequence[str], index_folder: str) -> tuple[int, int]:
    """Numbers of labeled and unlabeled images. Raises as `open_split`."""
    first, second = (open_split(urls, index_folder).num_samples if urls else 0 for urls in (labeled, unlabeled))
    return first, second


def _highest_label(split: Split) -> int:
    return max(
        (max(table.column("label").drop_null().to_pylist(), default=-1) for table in split.indexes()), default=-1
    )


def _sides(split: Split) -> Iterator[int]:
    """Yield the shorter sides, in pixels, of at most _MEASURED images that are spread evenly over the split."""
    number = min(split.num_samples, _MEASURED)
    wanted = [split.num_samples * k // number for k in range(number)]
    first = 0
    with ImageReader([shard.url for shard in split.shards]) as reader:
        for position, shard in enumerate(split.shards):
            rows = [row - first for row in wanted if first <= row < first + shard.num_samples]
            first += shard.num_samples
            if rows:
                places = places_in(shard.index())
                for content in reader.images(position, [places[row] for row in rows]):
                    yield from _side(content)


def _side(content: bytes) -> Iterator[int]:
    """Yield the shorter side of an encoded image; nothing if it is none, which is for the stages to report."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            yield min(image.size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged headers
        return
