"""Benchmark photos: JPEGs of 500 × 375 pixels and 50 kB, random crops of scikit-image's photos, in WebDataset shards."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.write import Fields, labeled_members, write_shards

PHOTOS = (
    "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg",
    "rocket.jpg",
)  # fmt: skip
WIDTH, HEIGHT = 500, 375


def make_photos(
    folder: str,
    num_shards: int,
    per_shard: int,
    seed: int = 0,
    shape: tuple[int, int] = (WIDTH, HEIGHT),
    labeled: bool = False,
) -> str:
    """Write shards of photos to `folder`, unless they exist; return their pattern. A label is an index of PHOTOS."""
    if not (Path(folder) / "manifest.json").exists():
        samples = _samples(num_shards * per_shard, seed, shape, labeled)
        write_shards(samples, folder, "photos", per_shard, PHOTOS if labeled else None)
    return f"{folder}/*.tar"


def _samples(number: int, seed: int, shape: tuple[int, int], labeled: bool) -> Iterator[tuple[str, Fields]]:
    photos = [_photo(name) for name in PHOTOS]
    generator = np.random.default_rng(seed)
    for position in range(number):
        which = position % len(photos)
        content = photo_jpeg(photos[which], *shape, generator)
        yield f"{position:07d}", labeled_members("jpg", content, which if labeled else None)


def _photo(name: str) -> np.ndarray:
    """Return one of scikit-image's photos, uint8 (H, W, 3); where it is not installed, noise with a photo's spectrum."""
    if (found := find_spec("skimage")) is not None and found.origin is not None:
        return np.asarray(Image.open(Path(found.origin).parent / "data" / name).convert("RGB"))
    generator = np.random.default_rng(PHOTOS.index(name))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(768), indexing="ij"))
    spectrum = np.fft.fft2(generator.normal(size=(3, 512, 768))) / np.maximum(frequency, 1 / 768) ** 1.5
    pixels = np.fft.ifft2(spectrum).real.transpose(1, 2, 0)
    return np.clip(127 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def photo_jpeg(photo: np.ndarray, width: int, height: int, generator: np.random.Generator) -> bytes:
    """Return a random crop, at least 70 % of the largest that fits, resized, as JPEG of quality 88 to 95."""
    share = min(photo.shape[1], photo.shape[0] * width / height) * generator.uniform(0.7, 1)
    crop_width, crop_height = int(share), int(share * height / width)
    left = int(generator.integers(0, photo.shape[1] - crop_width + 1))
    top = int(generator.integers(0, photo.shape[0] - crop_height + 1))
    crop = Image.fromarray(photo[top : top + crop_height, left : left + crop_width])
    buffer = io.BytesIO()
    crop.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=int(generator.integers(88, 96)))
    return buffer.getvalue()
