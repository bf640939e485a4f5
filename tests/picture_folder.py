"""Folders of pictures as people have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cup", "été", "class 10")


def picture(seed: int, mode: str = "RGB", file_format: str = "PNG", label: int | None = None) -> bytes:
    """An encoded picture of 24 × 24 pixels that depends on the seed; with a label, most of it has the colour of the class."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    if label is not None:
        noise = noise // 4 + (160 * np.eye(3)[label]).astype(np.uint8)
    image: Image.Image = Image.fromarray(noise).resize((24, 24))
    image = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_classes(folder: Path, per_class: int, first: int = 0) -> Path:
    """A folder per class with two views of each object; `first`: seed of the first picture."""
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            content = picture(first + 1000 * label + number, label=label)
            write(folder / name / f"object {number // 2}_view{number % 2}.png", content)
    return folder


def write_messy(folder: Path) -> dict[str, bool]:
    """Files as people have them: name → whether it is a picture that can be used."""
    good = {
        "cmyk.jpg": picture(1, "CMYK", "JPEG"),
        "deep.png": picture(2, "I;16"),
        "clear.png": picture(3, "RGBA"),
        "palette.png": picture(4, "P"),
        "loud.JPEG": picture(5, "RGB", "JPEG"),
        "web.webp": picture(6, "RGB", "WEBP"),
        "scan.3.v1.jpg": picture(7, "L", "JPEG"),
        "b/фото (1).png": picture(8),
        "b/copy of фото.png": picture(8),
        "really a png.jpg": picture(9),
    }
    bad = {
        "half.jpg": picture(10, "RGB", "JPEG")[:300],
        "empty.png": b"",
        "text.png": b"no picture",
        "notes.txt": b"notes",
        "film.mp4": b"film",
        "moving.gif": picture(11, "P", "GIF"),
        ".hidden.png": picture(12),
        "Thumbs.db": b"x",
    }
    for name, content in (good | bad).items():
        write(folder / name, content)
    return dict.fromkeys(good, True) | dict.fromkeys(bad, False)
