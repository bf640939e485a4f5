"""Write a small labeled data set as shards of three splits: the images of one thing are all in one split."""

from __future__ import annotations

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import storage
from ..errors import DataError
from ..images.held_out_hashes import held_out_row, write_hashes
from ..shards.split import MANIFEST_NAME
from ..shards.write import Fields, labeled_members, require_ours, write_shards

SHARES = {"labeled": 0.6, "validation": 0.2, "test": 0.2}
_PER_SHARD, _MARKER = 1000, "recipe.json"
_MIN_THINGS = 5  # of a class: one or more in every split


class LabeledImage(NamedTuple):
    """An image, (H, W) or (H, W, 3) uint8, and its class. Images of one `thing` are never in two splits."""

    thing: str
    label: int
    pixels: np.ndarray


Read = Callable[[Path], tuple[Sequence[LabeledImage], Sequence[str]]]


def write_recipe(name: str, out: str, seed: int, licence: str, read: Read) -> None:
    """Write the splits of a recipe below `out`, unless they are complete, and print the licence of the images.

    Args:
        read: gives images and class names; may use the folder that it gets while it runs.

    Raises DataError when `out` has other files, and as `read`.
    """
    if is_written(out, {"recipe": name, "seed": seed}):
        print(f"{out}: written already")
    else:
        with tempfile.TemporaryDirectory() as folder:
            images, class_names = read(Path(folder))
        write_splits(out, images, class_names, seed)
    print(f"licence of the images: {licence}")


def is_written(out: str, settings: Mapping[str, object]) -> bool:
    """Whether all splits are complete below `out`; records the settings of a new folder.

    Raises DataError when the folder has other files, or splits with other settings.
    """
    claim(out, _MARKER, json.dumps(dict(settings), sort_keys=True), SHARES)
    return all(storage.exists(storage.join(out, name, MANIFEST_NAME)) for name in SHARES)


def claim(out: str, marker: str, settings: str, splits: Iterable[str]) -> None:
    """Record in the file `marker` that the splits below `out` are ours. Raises DataError when others have their names."""
    url, text = storage.join(out, marker), f"{settings}\n"
    if not storage.exists(url):
        for name in splits:
            if storage.exists(storage.join(out, name, MANIFEST_NAME)):
                raise DataError(f"{out}/{name} holds shards of another packing; choose another out=")
            require_ours(storage.join(out, name), name)
        storage.write_text(url, text)
    if (found := storage.read_text(url)) != text:
        raise DataError(f"{out}: another split was begun there ({found.strip()}); choose another out=")


def write_splits(out: str, images: Sequence[LabeledImage], class_names: Sequence[str], seed: int) -> None:
    """Write `labeled`, `validation` and `test` below `out`, except those that are complete, and print how many images each has."""
    parts = split_things(images, len(class_names), seed)
    for name, part in parts.items():
        folder = storage.join(out, name)
        if not storage.exists(storage.join(folder, MANIFEST_NAME)):
            _write(folder, name, [images[number] for number in part], class_names)
    counts = ", ".join(f"{len(part):,} {name}" for name, part in parts.items())
    print(f"{out}: {len(class_names)} classes; images: {counts}")


def split_things(images: Sequence[LabeledImage], num_classes: int, seed: int) -> dict[str, list[int]]:
    """Split → shuffled indices of `images`: of each class 60, 20 and 20 % of its things. Raises DataError for a class with fewer
    than five."""
    generator = np.random.default_rng(seed)
    things: list[dict[str, list[int]]] = [defaultdict(list) for _ in range(num_classes)]
    for number, image in enumerate(images):
        things[image.label][image.thing].append(number)
    parts: dict[str, list[int]] = {name: [] for name in SHARES}
    for label, by_name in enumerate(things):
        if len(by_name) < _MIN_THINGS:
            raise DataError(f"class {label} has {len(by_name)} things; {_MIN_THINGS} or more are needed")
        names = [sorted(by_name)[position] for position in generator.permutation(len(by_name))]
        start = 0.0
        for part, share in SHARES.items():
            chosen = names[round(start * len(names)) : round((start + share) * len(names))]
            parts[part] += [number for name in chosen for number in by_name[name]]
            start += share
    return {name: [part[position] for position in generator.permutation(len(part))] for name, part in parts.items()}


def _write(folder: str, name: str, images: Sequence[LabeledImage], class_names: Sequence[str]) -> None:
    def samples() -> Iterator[tuple[str, Fields]]:
        for number, image in enumerate(images):
            yield f"{number:06d}", labeled_members("png", encode_png(image.pixels), image.label)

    def write_sidecars() -> None:
        write_hashes(folder, (held_out_row(_colour(image.pixels)) for image in images))

    write_shards(samples(), folder, name, _PER_SHARD, class_names, write_sidecars)


def _colour(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """An image, uint8, as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def on_white(image: Image.Image, side: int) -> np.ndarray:
    """The image, with its transparency on white, shrunk to fit and centred: (side, side, 3) uint8."""
    picture = image.convert("RGBA")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    corner = (side - picture.width) // 2, (side - picture.height) // 2
    canvas.alpha_composite(picture, corner)
    return np.asarray(canvas.convert("RGB"))
