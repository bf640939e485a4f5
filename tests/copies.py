"""Photos, copies of them as they lie around on the web, and labels of such a corpus, for the tests of near-duplicates."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_image

from data import storage
from data.images.decode import Pixels, decode
from data.images.held_out_hashes import held_out_row, write_hashes
from data.images.similarity import image_hash
from data.labels.label_files import LABELS_MANIFEST, LabeledShard, label_table, write_labels
from data.labels.top_k import top_k_of
from data.shards.split import open_split
from data.shards.write import Fields, write_shards
from pipeline.core.layout import Layout
from pipeline.core.stage import Fingerprint, open_stage

TILE = 140
NUM_PHOTOS = 10


def photos(name: str) -> list[Pixels]:
    """Ten pictures without a common pixel: squares of a photo, `china.jpg` or `flower.jpg`, that are not nearly flat.

    uint8 (TILE, TILE, 3) each. The sky alone has a hash of noise: see docs/selection.md.
    """
    photo = load_sample_image(name)
    corners = [(top, left) for top in range(0, 427 - TILE, TILE) for left in range(0, 640 - TILE, TILE)]
    squares = [np.ascontiguousarray(photo[top : top + TILE, left : left + TILE]) for top, left in corners]
    return [square for square in squares if square.std() > 15][:NUM_PHOTOS]


def jpeg(image: Pixels, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resized(image: Pixels, factor: float) -> Pixels:
    side = round(TILE * factor)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def flipped(image: Pixels) -> Pixels:
    return np.ascontiguousarray(image[:, ::-1])


COPIES: dict[str, Callable[[Pixels], bytes]] = {
    "the same pixels": lambda image: jpeg(image, 95),
    "quality 50": lambda image: jpeg(image, 50),
    "half the size": lambda image: jpeg(resized(image, 0.5)),
    "double the size": lambda image: jpeg(resized(image, 2)),
    "flipped": lambda image: jpeg(flipped(image)),
    "flipped and half the size": lambda image: jpeg(resized(flipped(image), 0.5)),
    "flipped, double the size, quality 50": lambda image: jpeg(resized(flipped(image), 2), 50),
}


def _enhanced(image: Pixels, kind: Callable[[Image.Image], ImageEnhance._Enhance], factor: float) -> bytes:
    return jpeg(np.asarray(kind(Image.fromarray(image)).enhance(factor)))


def in_grey(image: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


EDITS: dict[str, Callable[[Pixels], bytes]] = {
    "a fifth darker": lambda image: _enhanced(image, ImageEnhance.Brightness, 0.8),
    "less contrast": lambda image: _enhanced(image, ImageEnhance.Contrast, 0.8),
    "colours a fifth stronger": lambda image: _enhanced(image, ImageEnhance.Color, 1.2),
    "colours a fifth weaker": lambda image: _enhanced(image, ImageEnhance.Color, 0.8),
    "grey": lambda image: jpeg(in_grey(image)),
    "grey, flipped, half the size": lambda image: jpeg(resized(in_grey(flipped(image)), 0.5), 50),
}


def disc(colour: str) -> Pixels:
    """A disc on white, uint8 (TILE, TILE, 3)."""
    return _drawn(lambda draw: draw.ellipse((20, 20, 120, 120), colour))


def square(colour: str) -> Pixels:
    """As `disc`, a square."""
    return _drawn(lambda draw: draw.rectangle((30, 30, 110, 110), colour))


def flag(*colours: str) -> Pixels:
    """As `disc`, upright stripes from edge to edge."""
    width = TILE / len(colours)

    def stripes(draw: ImageDraw.ImageDraw) -> None:
        for number, colour in enumerate(colours):
            draw.rectangle((number * width, 20, (number + 1) * width, 120), colour)

    return _drawn(stripes)


def _drawn(paint: Callable[[ImageDraw.ImageDraw], object]) -> Pixels:
    picture = Image.new("RGB", (TILE, TILE), "white")
    paint(ImageDraw.Draw(picture))
    return np.asarray(picture)


def write_held_out(folder: Path, images: Sequence[Pixels]) -> str:
    """A hashes.parquet; returns its path."""
    write_hashes(str(folder), map(held_out_row, images))
    return f"{folder}/hashes.parquet"


def write_labeled_shards(
    folder: Path, layout: Layout, images: Sequence[bytes], per_shard: int = 15
) -> list[LabeledShard]:
    """Unlabeled shards of encoded images in `folder`, and their labels as a stage that is done: class 0, confidence 0.9."""
    samples: list[tuple[str, Fields]] = [(f"{number:05d}", {"jpg": image}) for number, image in enumerate(images)]
    write_shards(samples, str(folder), "unlabeled", per_shard)
    stage = open_stage(layout.labels, "label", Fingerprint({}, {"images": str(len(images))}), force=True)
    corpus, entries, start = open_split(f"{folder}/*.tar", layout.indexes), [], 0
    for shard in corpus.shards:
        hashes = [image_hash(decode(image)) for image in images[start : start + shard.num_samples]]
        top_k = top_k_of(np.tile(np.array([[0.9, 0.1]], np.float32), (shard.num_samples, 1)), 2)
        table = label_table(shard.index(), np.arange(shard.num_samples), top_k, np.array(hashes, np.uint64))
        entries.append(write_labels(stage.path(f"{shard.name}.parquet"), shard, table, [], "test"))
        start += shard.num_samples
    storage.write_text(stage.path(LABELS_MANIFEST), json.dumps({"shards": [asdict(entry) for entry in entries]}))
    stage.commit([LABELS_MANIFEST], {"num_classes": 2, "class_names": None, "corpus": corpus.digest()})
    return entries
