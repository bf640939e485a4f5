"""Near-duplicates: which copies are found, how many other images are mistaken for copies, in grey and in colour, and how fast.

    python -m benchmarks.bench_near_duplicates [data=datasets/fashion_mnist] [emoji=datasets/emoji] [rows=500000]

Found: copies of squares of scikit-image's and scikit-learn's photos, of drawings (tests/colour_drawings.py), of emoji and of 1,000
held-out images of Fashion-MNIST. Mistaken: the same pictures in other colours; all unlabeled images of Fashion-MNIST against its 10,500
held-out ones, and emoji of the labeled split against those of the two others. Emoji need npm; emoji= leaves them out. Speed: `rows`
random hashes of 32 ones against 120,000 others, and a thumbnail with its colours, in one thread.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_image

from data import fashion_mnist
from data.errors import DataError
from data.images.decode import Pixels, decode
from data.images.held_out_hashes import HeldOutHashes
from data.images.similarity import CHROMA_SIDE, SIDE, chroma, image_hash, thumbnail
from data.recipes import emoji as emoji_recipe
from data.settings import run_command
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from pipeline.core.schema import SelectConfig
from teacher.near_duplicates.hash_index import HashIndex, UInt64
from teacher.near_duplicates.search import MAX_DISTANCE, NearDuplicateSearch
from teacher.near_duplicates.thumbnails import Thumbnails
from tests.colour_drawings import THINGS, drawing

SQUARE, NUM_COPIED, NUM_DRAWN, NUM_INDEXED = 240, 1000, 200, 120_000
LIMITS = (0.95, 0.98, 0.99, 0.995)
PHOTOS = (
    "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg",
    "camera.png", "coins.png", "moon.png", "gravel.png", "brick.png", "grass.png", "page.png",
)  # fmt: skip


def bench(data: str = "datasets/fashion_mnist", emoji: str = "datasets/emoji", rows: int = 500_000) -> None:
    """Print the tables; see the module docstring."""
    fashion_mnist.prepare(data)
    held_out, random = [*_images(f"{data}/validation/*.tar"), *_images(f"{data}/test/*.tar")], np.random.default_rng(0)
    chosen = random.choice(len(held_out), NUM_COPIED, replace=False)
    drawn = [np.asarray(drawing(list(THINGS)[number % len(THINGS)], random)) for number in range(NUM_DRAWN)]
    sets = {"photos": photo_squares(), "drawings": drawn, "fashion_mnist": [held_out[index] for index in chosen]}
    alarms = {"fashion_mnist": print_alarms("Fashion-MNIST", held_out, _images(f"{data}/unlabeled/*.tar"))}
    if emoji and _has_emoji(emoji):
        kept_apart = [*_images(f"{emoji}/validation/*.tar"), *_images(f"{emoji}/test/*.tar")]
        alarms["emoji"] = print_alarms("emoji", kept_apart, _images(f"{emoji}/labeled/*.tar"))
        sets["emoji"] = kept_apart[:NUM_COPIED]
    recall = {name: print_recall(name, images) for name, images in sets.items()}
    speed = measure_speed(rows)
    print(f"{rows:,} hashes against {NUM_INDEXED:,}, one thread: {speed:,.0f} rows/s of its time")
    grey, colour = measure_thumbnails()
    print(f"a thumbnail of 500 x 375 pixels: {1e6 * grey:,.0f} us, with its colours {1e6 * colour:,.0f} us")
    record = {"bench": "near_duplicates", "unit": "rows/s up", "ours": round(speed), "peers": {}, "floor": None}
    print(json.dumps(record | {"memory_mb": None, "seeds": 1, "recall": recall, "alarms": alarms}))


def _has_emoji(folder: str) -> bool:
    try:
        emoji_recipe.prepare(folder)
    except DataError as error:
        print(f"no emoji: {error}")
        return False
    return True


def photo_squares() -> list[Pixels]:
    """Return disjoint squares with some contrast, uint8 (SQUARE, SQUARE, 3)."""
    folder = Path(skimage.__file__).parent / "data"
    photos = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOS]
    photos += [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    squares = [
        np.ascontiguousarray(photo[top : top + SQUARE, left : left + SQUARE])
        for photo in photos
        for top in range(0, photo.shape[0] - SQUARE + 1, SQUARE)
        for left in range(0, photo.shape[1] - SQUARE + 1, SQUARE)
    ]
    return [square for square in squares if square.mean(axis=2).std() > 15]


def _encoded(image: Pixels, quality: int = 90) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def _resized(image: Pixels, factor: float) -> Pixels:
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _flipped(image: Pixels) -> Pixels:
    return np.ascontiguousarray(image[:, ::-1])


def _cropped(image: Pixels, part: float) -> Pixels:
    """Crop the center; `part` of the height and width is cut off."""
    cut = round(part * image.shape[0])
    end = image.shape[0] - (cut - cut // 2)
    return np.ascontiguousarray(image[cut // 2 : end, cut // 2 : end])


def _enhanced(image: Pixels, kind: Callable[[Image.Image], ImageEnhance._Enhance], factor: float) -> Pixels:
    return _encoded(np.asarray(kind(Image.fromarray(image)).enhance(factor)))


def _grey(image: Pixels) -> Pixels:
    return _encoded(np.asarray(Image.fromarray(image).convert("L").convert("RGB")))


def _warm(image: Pixels) -> Pixels:
    return _encoded(np.clip(image * np.array([1.1, 1, 0.9]), 0, 255).astype(np.uint8))


def _other_hue(image: Pixels, degrees: int) -> Pixels:
    """The hue turned around the colour circle, and the grey values as before where the colours allow it."""
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.uint8(degrees * 256 // 360)
    turned = np.asarray(Image.fromarray(hsv, "HSV").convert("YCbCr")).copy()
    turned[..., 0] = np.asarray(Image.fromarray(image).convert("L"))
    return np.asarray(Image.fromarray(turned, "YCbCr").convert("RGB"))


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "quality 50": lambda image: _encoded(image, 50),
    "half the size": lambda image: _encoded(_resized(image, 0.5)),
    "double the size": lambda image: _encoded(_resized(image, 2)),
    "flipped": lambda image: _encoded(_flipped(image)),
    "flipped, half": lambda image: _encoded(_resized(_flipped(image), 0.5)),
    "flipped, double": lambda image: _encoded(_resized(_flipped(image), 2)),
    "2 % cropped": lambda image: _encoded(_cropped(image, 0.02)),
    "5 % cropped": lambda image: _encoded(_cropped(image, 0.05)),
    "10 % cropped": lambda image: _encoded(_cropped(image, 0.10)),
    "a fifth darker": lambda image: _enhanced(image, ImageEnhance.Brightness, 0.8),
    "a fifth brighter": lambda image: _enhanced(image, ImageEnhance.Brightness, 1.2),
    "less contrast": lambda image: _enhanced(image, ImageEnhance.Contrast, 0.8),
    "more contrast": lambda image: _enhanced(image, ImageEnhance.Contrast, 1.2),
    "paler": lambda image: _enhanced(image, ImageEnhance.Color, 0.7),
    "more colourful": lambda image: _enhanced(image, ImageEnhance.Color, 1.3),
    "far paler": lambda image: _enhanced(image, ImageEnhance.Color, 0.3),
    "warmer": _warm,
    "grey": _grey,
    "hue + 60 degrees": lambda image: _other_hue(image, 60),
    "hue + 180 degrees": lambda image: _other_hue(image, 180),
}
"""Copies; the last two are none."""


def print_recall(name: str, images: Sequence[Pixels]) -> dict[str, dict[str, float]]:
    """Print a line per kind of copy; return the fractions found with the default limit in grey and in colour, by kind."""
    limit, found, known = SelectConfig().copy_correlation, dict[str, dict[str, float]](), _thumbnails(images)
    hashes = np.array([image_hash(image) for image in images], np.uint64)
    flipped = np.array([image_hash(_flipped(image)) for image in images], np.uint64)
    print(f"copies of {len(images):,} {name}, found in grey at {limit}; in colour at {', '.join(map(str, LIMITS))}")
    for kind, copy in COPIES.items():
        copies = [copy(image) for image in images]
        asked = np.array([image_hash(image) for image in copies], np.uint64)
        is_near = _proposed(flipped if "flipped" in kind else hashes, asked)
        alike = {
            how: _alike(copies, known if how == "colour" else _thumbnails(images, False)) for how in ("grey", "colour")
        }
        parts = [float((is_near & (alike["colour"] >= value)).mean()) for value in LIMITS]
        found[kind] = {how: round(float((is_near & (values >= limit)).mean()), 4) for how, values in alike.items()}
        print(f"  {kind:18} proposed {is_near.mean():6.1%}, in grey {found[kind]['grey']:6.1%}, in colour", end="  ")
        print("  ".join(f"{part:6.1%}" for part in parts), f"  lowest {alike['colour'].min():.4f}")
    return found


def _thumbnails(images: Sequence[Pixels], has_chroma: bool = True) -> Thumbnails:
    grey = np.array([thumbnail(image) for image in images]).reshape(-1, SIDE, SIDE)
    colours = np.zeros((len(images), 2, CHROMA_SIDE, CHROMA_SIDE), np.int8)
    if has_chroma:
        colours[:] = [chroma(image) for image in images]
    return Thumbnails(grey, colours, np.full(len(images), has_chroma))


def _alike(copies: Sequence[Pixels], known: Thumbnails) -> NDArray[np.float32]:
    """Correlation of each copy, or of its mirror image, with its original."""
    seen, rows = _thumbnails(copies), np.arange(len(copies))
    return np.maximum(*(each.correlations(rows, known, rows, -1) for each in (seen, seen.mirrored())))


def _proposed(hashes: UInt64, asked: UInt64) -> NDArray[np.bool_]:
    """Return whether each hash finds its original."""
    is_near = np.zeros(len(asked), bool)
    for pairs in HashIndex(hashes).pairs(asked, MAX_DISTANCE):
        is_near[pairs.query[pairs.query == pairs.reference]] = True
    return is_near


def print_alarms(name: str, held_out: Sequence[Pixels], unlabeled: Sequence[Pixels]) -> dict[str, dict[str, int]]:
    """Print and return the number of unlabeled images taken for copies, in grey and in colour, by correlation threshold."""
    asked = np.array([image_hash(image) for image in unlabeled], np.uint64)
    counts = dict[str, dict[str, int]]()
    for how in ("grey", "colour"):
        search = NearDuplicateSearch(_held_out(held_out, how == "colour"), min_correlation=-1)
        proposed = search.propose(asked)
        seen = _thumbnails([unlabeled[row] for row in proposed])
        found = search.confirm(asked[proposed], seen, np.ones(len(proposed), bool))
        counts[how] = {str(limit): int((found.correlation >= limit).sum()) for limit in (*LIMITS, 0.999)}
        values = ", ".join(f"{count:,} at {limit}" for limit, count in counts[how].items())
        print(f"{name}: {len(unlabeled):,} images, {len(proposed):,} proposed; taken for copies in {how}: {values}")
    return counts


def _held_out(images: Sequence[Pixels], has_chroma: bool) -> HeldOutHashes:
    count = len(images)
    return HeldOutHashes(
        hashes=np.array([image_hash(image) for image in images], np.uint64),
        hashes_flipped=np.array([image_hash(_flipped(image)) for image in images], np.uint64),
        thumbnails=np.array([thumbnail(image) for image in images]),
        chroma=np.array([chroma(image) * has_chroma for image in images], np.int8),
        has_chroma=np.full(count, has_chroma),
        urls=("",),
        files=np.zeros(count, np.int32),
        rows=np.arange(count),
        digest="",
    )


def measure_thumbnails(repeats: int = 200) -> tuple[float, float]:
    """Seconds of CPU time for a thumbnail of 500 x 375 pixels, in grey and with its colours."""
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    times = []
    for parts in ((thumbnail,), (thumbnail, chroma)):
        started = time.thread_time()
        for _ in range(repeats):
            for part in parts:
                part(image)
        times.append((time.thread_time() - started) / repeats)
    return times[0], times[1]


def measure_speed(rows: int) -> float:
    """Return rows per second of CPU time, in batches of 10,000 as in a shard."""
    generator = np.random.default_rng(0)
    ones = np.repeat(np.arange(2, dtype=np.uint8)[None], NUM_INDEXED + rows, axis=0).repeat(32, axis=1)
    hashes = np.packbits(generator.permuted(ones, axis=1), axis=1).view(np.uint64).ravel()
    index, started = HashIndex(hashes[:NUM_INDEXED]), time.thread_time()
    for begin in range(NUM_INDEXED, len(hashes), 10_000):
        for _ in index.pairs(hashes[begin : begin + 10_000], MAX_DISTANCE):
            pass
    return rows / (time.thread_time() - started)


def _images(pattern: str) -> list[Pixels]:
    split = open_split(pattern, "")
    with ImageReader([shard.url for shard in split.shards]) as reader:
        return [
            decode(reader.read(position, row["offset"], row["size"]))
            for position, shard in enumerate(split.shards)
            for row in shard.index().to_pylist()
        ]


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
