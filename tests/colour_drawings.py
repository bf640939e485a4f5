"""A small colour set, drawn: nine things on busy backgrounds, in which colour, place, size and angle say nothing about the class.

So a model must see shapes, for which few drawings suffice only to one that has seen many pictures before.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # pixels
_Draw = Callable[[ImageDraw.ImageDraw, str, str], None]


def _hue(random: np.random.Generator, light: float) -> str:
    red, green, blue = colorsys.hls_to_rgb(random.uniform(), light, random.uniform(0.4, 1))
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"


def _car(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.rectangle((10, 55, 118, 85), main)
    draw.polygon([(32, 55), (45, 32), (85, 32), (100, 55)], other)
    for left in (24, 82):
        draw.ellipse((left, 74, left + 24, 98), "black")


def _cup(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.ellipse((70, 48, 114, 88), outline=other, width=8)
    draw.polygon([(24, 34), (94, 34), (84, 104), (34, 104)], main)
    draw.ellipse((24, 26, 94, 42), other)


def _fish(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.polygon([(86, 64), (118, 38), (118, 90)], other)
    draw.ellipse((10, 40, 96, 88), main)
    draw.ellipse((26, 54, 34, 62), "white", "black")


def _flower(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.line((64, 64, 64, 122), "green", 5)
    for angle in np.arange(0, 2 * np.pi, np.pi / 3):
        x, y = 64 + 24 * np.cos(angle), 46 + 24 * np.sin(angle)
        draw.ellipse((x - 15, y - 15, x + 15, y + 15), main)
    draw.ellipse((52, 34, 76, 58), other)


def _house(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.rectangle((26, 58, 102, 112), main)
    draw.polygon([(14, 60), (64, 18), (114, 60)], other)
    draw.rectangle((56, 82, 74, 112), "black")


def _key(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.ellipse((8, 44, 52, 88), outline=main, width=10)
    draw.line((50, 66, 118, 66), main, 9)
    for x in (92, 110):
        draw.line((x, 66, x, 86), other, 8)


def _mushroom(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.rectangle((50, 62, 78, 112), "white")
    draw.pieslice((14, 22, 114, 106), 180, 360, main)
    for x, y in ((36, 48), (62, 34), (86, 50)):
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), other)


def _star(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 22, 56)
    draw.polygon([(64 + r * np.cos(a), 64 + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)], main, other)


def _umbrella(draw: ImageDraw.ImageDraw, main: str, other: str) -> None:
    draw.pieslice((10, 18, 118, 126), 180, 360, main)
    draw.line((64, 20, 64, 108), other, 5)
    draw.arc((64, 96, 84, 120), 0, 180, other, 5)


THINGS: dict[str, _Draw] = {
    "car": _car, "cup": _cup, "fish": _fish, "flower": _flower, "house": _house, "key": _key, "mushroom": _mushroom,
    "star": _star, "umbrella": _umbrella,
}  # fmt: skip


def thing(name: str, colour: str) -> np.ndarray:
    """One thing of this colour and black on white: uint8 (SIDE, SIDE, 3)."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    THINGS[name](ImageDraw.Draw(picture), colour, "black")
    return np.asarray(picture)


def drawing(name: str, random: np.random.Generator) -> Image.Image:
    """One thing, of any colour, size, angle and place, on a background of blobs."""
    picture = Image.new("RGB", (SIDE, SIDE), _hue(random, random.uniform(0.2, 0.9)))
    background = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, width, height = random.integers(-20, SIDE, 2).tolist() + random.integers(10, 60, 2).tolist()
        shape = background.ellipse if random.uniform() < 0.5 else background.rectangle
        shape((x, y, x + width, y + height), _hue(random, random.uniform(0.2, 0.9)))
    layer = Image.new("RGBA", (SIDE, SIDE))
    THINGS[name](ImageDraw.Draw(layer), _hue(random, random.uniform(0.3, 0.8)), _hue(random, random.uniform(0.1, 0.9)))
    side = int(SIDE * random.uniform(0.5, 0.9))
    layer = layer.resize((side, side)).rotate(random.uniform(-30, 30), Image.Resampling.BICUBIC)
    left, top = random.integers(0, SIDE - side + 1, 2).tolist()
    picture.paste(layer, (left, top), layer)
    return picture


def write_drawings(folder: Path, per_class: int, seed: int) -> None:
    """PNG files below `folder`, in a folder for each class."""
    random = np.random.default_rng(seed)
    for name in THINGS:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            drawing(name, random).save(folder / name / f"{number}.png")
