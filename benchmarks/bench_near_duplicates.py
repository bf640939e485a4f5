"""Near-duplicates: which copies are found, how many other images are mistaken for copies, and how fast.

    python -m benchmarks.bench_near_duplicates [data=datasets/fashion_mnist] [rows=500000]

Found: copies of squares of scikit-image's and scikit-learn's photos, and of 1,000 held-out images of Fashion-MNIST. Mistaken: all
unlabeled images of Fashion-MNIST against its 10,500 held-out ones. Speed: `rows` random hashes of 32 ones against 120,000
others, in one thread.
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
from PIL import Image
from sklearn.datasets import load_sample_image

from data import fashion_mnist
from data.images.decode import Pixels, decode
from data.images.held_out_hashes import HeldOutHashes, held_out_row
from data.images.similarity import SIDE, image_hash, mirrored, normalized, thumbnail
from data.settings import run_command
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from pipeline.core.schema import SelectConfig
from teacher.near_duplicates.hash_index import HashIndex, UInt64
from teacher.near_duplicates.search import MAX_DISTANCE, NearDuplicateSearch

SQUARE, NUM_COPIED, NUM_INDEXED = 240, 1000, 120_000
LIMITS = (0.95, 0.98, 0.99, 0.995)
PHOTOS = (
    "astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg",
    "camera.png", "coins.png", "moon.png", "gravel.png", "brick.png", "grass.png", "page.png",
)  # fmt: skip


def bench(data: str = "datasets/fashion_mnist", rows: int = 500_000) -> None:
    """Print the tables; see the module docstring."""
    fashion_mnist.prepare(data)
    squares = photo_squares()
    print(f"{len(squares)} squares of {SQUARE} pixels of photos; part of the copies found at a correlation of …")
    recall = print_recall(squares)
    print(f"  different squares correlate at most {_most_alike(squares):.3f}")
    held_out = [*_images(f"{data}/validation/*.tar"), *_images(f"{data}/test/*.tar")]
    chosen = np.random.default_rng(0).choice(len(held_out), NUM_COPIED, replace=False)
    print(f"{NUM_COPIED} held-out images of Fashion-MNIST")
    print_recall([held_out[index] for index in chosen])
    alarms = print_alarms(held_out, _images(f"{data}/unlabeled/*.tar"))
    speed = measure_speed(rows)
    print(f"{rows:,} hashes against {NUM_INDEXED:,}, one thread: {speed:,.0f} rows/s of its time")
    record = {"bench": "near_duplicates", "unit": "rows/s up", "ours": round(speed), "peers": {}, "floor": None}
    print(json.dumps(record | {"memory_mb": None, "seeds": 1, "recall": recall, "fashion_mnist": alarms}))


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
}


def print_recall(images: Sequence[Pixels]) -> dict[str, float]:
    """Print a line per kind of copy; return the fraction found with the defaults, by kind."""
    known, found = [held_out_row(image) for image in images], {}
    print(f"  {'':16}      proposed  " + "  ".join(f"{limit:>6}" for limit in LIMITS) + "  lowest, median")
    for kind, copy in COPIES.items():
        copies = [copy(image) for image in images]
        plain = [item.image_hash_flipped if "flipped" in kind else item.image_hash for item in known]
        is_near = _proposed(np.array(plain, np.uint64), np.array([image_hash(c) for c in copies], np.uint64))
        seen = np.array([thumbnail(c) for c in copies])
        right = np.frombuffer(b"".join(item.thumbnail for item in known), np.uint8).reshape(-1, SIDE, SIDE)
        alike = (normalized(mirrored(seen) if "flipped" in kind else seen) * normalized(right)).sum(axis=1)
        parts = [float((is_near & (alike >= limit)).mean()) for limit in LIMITS]
        print(f"  {kind:16} {is_near.mean():13.1%}  " + "  ".join(f"{part:6.1%}" for part in parts), end="")
        print(f"  {alike.min():.4f}, {np.median(alike):.4f}")
        found[kind] = round(float((is_near & (alike >= SelectConfig().copy_correlation)).mean()), 4)
    return found


def _proposed(hashes: UInt64, asked: UInt64) -> NDArray[np.bool_]:
    """Return whether each hash finds its original."""
    is_near = np.zeros(len(asked), bool)
    for pairs in HashIndex(hashes).pairs(asked, MAX_DISTANCE):
        is_near[pairs.query[pairs.query == pairs.reference]] = True
    return is_near


def _most_alike(images: Sequence[Pixels]) -> float:
    vectors = normalized(np.array([thumbnail(image) for image in images]))
    products = vectors @ vectors.T
    np.fill_diagonal(products, -1)
    return float(products.max())


def print_alarms(held_out: Sequence[Pixels], unlabeled: Sequence[Pixels]) -> dict[str, int]:
    """Return the number of unlabeled images mistaken for copies, by correlation threshold."""
    columns = list(zip(*map(held_out_row, held_out), strict=True))
    pictures = np.frombuffer(b"".join(columns[2]), np.uint8).reshape(-1, SIDE, SIDE)
    rows = np.arange(len(held_out))
    hashes, flipped = (np.array(column, np.uint64) for column in columns[:2])
    known = HeldOutHashes(hashes, flipped, pictures, ("",), np.zeros(len(rows), np.int32), rows, "")
    search = NearDuplicateSearch(known, min_correlation=-1)
    asked = np.array([image_hash(image) for image in unlabeled], np.uint64)
    proposed = search.propose(asked)
    seen = np.array([thumbnail(unlabeled[row]) for row in proposed])
    found = search.confirm(asked[proposed], seen, np.ones(len(proposed), bool))
    counts = {str(limit): int((found.correlation >= limit).sum()) for limit in (*LIMITS, 0.999)}
    print(
        f"  {len(unlabeled):,} unlabeled images: {len(proposed):,} proposed, {int(np.isin(asked, hashes).sum())} of equal hash;",
        end="",
    )
    print(" taken for copies: " + ", ".join(f"{count:,} at {limit}" for limit, count in counts.items()))
    return counts


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
