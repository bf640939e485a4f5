"""Draw a picture set that nobody has tuned for: another seed is another problem.

    python -m benchmarks.surprise out=FOLDER [seed=0] [labeled=30] [test=800] [unlabeled=3000] [size=48]

writes out/train/<class>/…, out/test/<class>/…, out/unlabeled/… and out/truth.csv (path below `out`, class; no class: ""). Two of motif,
texture and colour make a class, and the third says nothing; which two, and their values, follow from the seed. There are `labeled`
training pictures a class. Unlabeled pictures are long-tailed; a quarter are from another domain (other backgrounds, more blur), a tenth
belong to no class. Files are as people have them: JPEG, PNG with transparency, WebP, EXIF rotation, odd names, nested folders, hidden
files, some damaged.
"""

from __future__ import annotations

import csv
import io
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from data.settings import run_command

MOTIFS = ("triangle", "square", "pentagon", "star", "ring", "cross", "crescent", "arrow", "heart", "drop")
TEXTURES = ("plain", "stripes", "dots", "checks", "rings", "rays")
HUES = (0, 28, 55, 120, 175, 215, 265, 310)  # degrees
TRAITS = ("motif", "texture", "colour")
_POOLS: tuple[Sequence[str | int], ...] = (MOTIFS, TEXTURES, HUES)
_NAMES = (
    "hōrse fly",
    "Zander",
    "b-17",
    "class 10",
    "class 9",
    "été",
    "Über",
    "no_name",
    "x.y",
    "Alpha",
    "kiwi",
    "lamp",
)
_CROSS = (
    (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3),
    (-0.3, -0.3),
)  # fmt: skip
_ARROW = ((-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3))
_CORNERS = {"triangle": (3, -math.pi / 2), "square": (4, math.pi / 4), "pentagon": (5, -math.pi / 2)}  # number, angle
_KINDS = {"jpg": 40, "jpeg": 8, "JPG": 6, "png": 22, "rgba": 8, "webp": 10, "turned": 6}  # of files, and how often
_ORIENTATION, _TURNED = 0x0112, 6  # EXIF's tag, and "turn right to view"
_JUNK = ("train/.DS_Store", "train/{name}/Thumbs.db", "unlabeled/.hidden/x.txt", "unlabeled/notes.txt")
Point = tuple[float, float]
Value = str | int


@dataclass(frozen=True)
class Problem:
    """What makes the classes of a seed.

    Attributes:
        matters: positions in TRAITS of the two traits that make a class.
        classes: name → values of these traits.
        strangers: values that make none of the classes.
    """

    matters: tuple[int, ...]
    classes: dict[str, tuple[Value, Value]]
    strangers: list[tuple[Value, Value]]

    def traits(self, values: tuple[Value, Value], rng: random.Random) -> list[Value]:
        """Motif, texture and hue of a picture: two of the class, the third drawn."""
        drawn = [rng.choice(pool) for pool in _POOLS]
        for position, value in zip(self.matters, values, strict=True):
            drawn[position] = value
        return drawn


def draw_problem(rng: random.Random) -> Problem:
    """Five to nine classes."""
    names = rng.sample(_NAMES, rng.randint(5, 9))
    matters = tuple(rng.sample(range(len(TRAITS)), 2))
    pools = [rng.sample(list(pool), 4) for pool in _POOLS]
    pairs = rng.sample([(one, other) for one in pools[matters[0]] for other in pools[matters[1]]], len(names) + 3)
    return Problem(matters, dict(zip(names, pairs, strict=False)), pairs[len(names) :])


def write_problem(
    out: str, seed: int = 0, labeled: int = 30, test: int = 800, unlabeled: int = 3000, size: int = 48
) -> None:
    """Write the pictures; see the module docstring. `test`: of all classes together; `size`: pixels, sides are 0.8 to 2 times that."""
    rng = random.Random(f"surprise {seed}")
    problem = draw_problem(rng)
    writer, classes = _Writer(Path(out), problem, rng, size), problem.classes
    for name, values in classes.items():
        for folder, count in (("train", labeled), ("test", test // len(classes))):
            for _ in range(count):
                writer.write(f"{folder}/{name}", values, name)
    tail = [1 / (rank + 1) ** 0.7 for rank in range(len(classes))]
    for _ in range(unlabeled):
        folder, other = f"unlabeled/{rng.choice(('a', 'b/c', 'd e'))}", rng.random() < 0.25
        name = "" if rng.random() < 0.1 else rng.choices(list(classes), tail)[0]
        writer.write(folder, classes[name] if name else rng.choice(problem.strangers), name, other)
    writer.finish()
    kinds = " and ".join(TRAITS[position] for position in sorted(problem.matters))
    counts = f"{labeled} labeled a class, {unlabeled} unlabeled, {test // len(classes) * len(classes)} test"
    print(f"{len(classes)} classes by {kinds}: {', '.join(classes)}; {counts}: {out}")


class _Writer:
    """Writes pictures as files, and their classes."""

    def __init__(self, out: Path, problem: Problem, rng: random.Random, size: int) -> None:
        self._out, self._problem, self._rng, self._size = out, problem, rng, size
        self._truth: list[tuple[str, str]] = []

    def write(self, folder: str, values: tuple[Value, Value], name: str, other: bool = False) -> None:
        """Draw and write a picture. `other`: of the other domain."""
        rng, number = self._rng, len(self._truth) + 1
        side = int(self._size * rng.uniform(0.8, 2))
        content, ending = encode(*picture(self._problem.traits(values, rng), side, rng, other), rng)
        if folder.startswith("unlabeled") and rng.random() < 0.004:
            content = content[: len(content) // 2]
        stems = f"{number:06d}", f"IMG {number}", f"scan.{number}.v1", f"фото-{number}", f"{number:06d} (1)"
        path = self._out / folder / f"{rng.choice(stems)}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._truth.append((path.relative_to(self._out).as_posix(), name))

    def finish(self) -> None:
        """Write files that are no pictures, and the truth."""
        for junk in _JUNK:
            path = self._out / junk.format(name=next(iter(self._problem.classes)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"junk")
        with (self._out / "truth.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "class"), *self._truth])


def read_truth(out: Path) -> dict[str, str]:
    """Path below the folder → class, "" for none."""
    with (out / "truth.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row["class"] for row in csv.DictReader(file)}


def picture(
    traits: Sequence[Value], side: int, rng: random.Random, other: bool = False
) -> tuple[Image.Image, Image.Image]:
    """A picture, RGB, and the mask of its motif: (side, side) pixels. Up to two smaller motifs distract."""
    image = _background(side, rng, other)
    mask = image
    for distracts in (True, True, False):
        drawn = [rng.choice(pool) for pool in _POOLS] if distracts else traits
        if not distracts or rng.random() >= 0.5:
            mask = _paste(image, drawn, side, rng, distracts)
    if rng.random() < (0.6 if other else 0.25):
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, side / 36)))
    gain = rng.uniform(0.6, 1.3)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 14), (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(image, float) * gain + noise, 0, 255).astype(np.uint8)), mask


def _paste(image: Image.Image, traits: Sequence[Value], side: int, rng: random.Random, distracts: bool) -> Image.Image:
    """Draw a motif onto the image; return its mask."""
    motif, texture, hue = str(traits[0]), str(traits[1]), float(traits[2])
    mask = _mask(motif, side, side * (rng.uniform(0.10, 0.16) if distracts else rng.uniform(0.24, 0.38)), rng)
    if distracts:
        shift = rng.randint(-side // 3, side // 3), rng.randint(-side // 3, side // 3)
        mask = Image.fromarray(np.roll(np.asarray(mask), shift, (0, 1)))
    first, second = np.array(_colour(hue, rng)), np.array(_colour(hue, rng)) * rng.uniform(0.25, 0.5)
    pattern = _texture(texture, side, rng)[:, :, None]
    image.paste(Image.fromarray((first * pattern + second * (1 - pattern)).astype(np.uint8)), mask=mask)
    return mask


def _around(count: int, radius: Callable[[int], float], offset: float = 0.0) -> list[Point]:
    """Points around the origin at equal angles."""
    angles = [2 * math.pi * number / count + offset for number in range(count)]
    return [(radius(number) * math.cos(angle), radius(number) * math.sin(angle)) for number, angle in enumerate(angles)]


def _outline(motif: str, radius: float) -> list[Point]:
    """Points of a motif around the origin."""
    if motif in _CORNERS:
        count, angle = _CORNERS[motif]
        return _around(count, lambda _: radius, angle)
    if motif == "star":
        return _around(10, lambda number: radius if number % 2 == 0 else radius * 0.45, -math.pi / 2)
    if motif in ("cross", "arrow"):
        return [(x * radius, y * radius) for x, y in (_CROSS if motif == "cross" else _ARROW)]
    if motif in ("heart", "drop"):
        curve = _heart if motif == "heart" else _drop
        return [curve(t, radius) for t in np.linspace(0, 2 * math.pi, 40).tolist()]
    return _around(40, lambda _: radius)  # ring, crescent: a hole is cut out of it


def _heart(t: float, radius: float) -> Point:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return radius * 0.062 * 16 * math.sin(t) ** 3, -radius * 0.062 * y


def _drop(t: float, radius: float) -> Point:
    return radius * 0.8 * math.sin(t) * math.sin(t / 2) ** 1.5, -radius * math.cos(t)


def _mask(motif: str, side: int, radius: float, rng: random.Random) -> Image.Image:
    angle = rng.uniform(-0.6, 0.6)
    x0, y0 = side / 2 + rng.uniform(-0.16, 0.16) * side, side / 2 + rng.uniform(-0.16, 0.16) * side
    c, s = math.cos(angle), math.sin(angle)
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    draw.polygon([(x0 + c * x - s * y, y0 + s * x + c * y) for x, y in _outline(motif, radius)], fill=255)
    if motif == "ring":
        draw.ellipse((x0 - radius * 0.55, y0 - radius * 0.55, x0 + radius * 0.55, y0 + radius * 0.55), fill=0)
    if motif == "crescent":
        x, y, hole = x0 + radius * 0.5 * c, y0 + radius * 0.5 * s, radius * 0.8
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    return image


def _texture(texture: str, side: int, rng: random.Random) -> NDArray[np.float64]:
    """(side, side) in 0 to 1."""
    y, x = np.mgrid[:side, :side] / side
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(5, 9)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    turn = 2 * math.pi * frequency
    radius, phi = np.hypot(x - 0.5, y - 0.5), np.arctan2(y - 0.5, x - 0.5)
    patterns = {
        "stripes": lambda: np.sin(turn * u) > 0,
        "dots": lambda: np.cos(turn * u) + np.cos(turn * v) > 0.9,
        "checks": lambda: (np.sin(turn * u) > 0) ^ (np.sin(turn * v) > 0),
        "rings": lambda: np.sin(2 * math.pi * frequency * 1.6 * radius) > 0,
        "rays": lambda: np.sin(round(frequency) * phi + angle) > 0,
    }
    return np.full((side, side), 0.5) if texture == "plain" else patterns[texture]().astype(float)


def _colour(hue: float, rng: random.Random, spread: float = 9) -> tuple[int, ...]:
    """RGB of a hue in degrees, give or take `spread`, with any saturation and brightness but the lowest."""
    turned = int((hue + rng.uniform(-spread, spread)) % 360 / 360 * 255)
    pixel = Image.new("HSV", (1, 1), (turned, rng.randint(120, 235), rng.randint(120, 235)))
    return tuple(int(value) for value in np.asarray(pixel.convert("RGB"))[0, 0])


def _background(side: int, rng: random.Random, other: bool) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32))
    if other:  # coarse blotches
        small = noise.integers(40, 216, (rng.randint(3, 6), rng.randint(3, 6), 3), dtype=np.uint8)
        return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
    top, bottom = (np.array(_colour(rng.uniform(0, 360), rng, 180), float) * 0.5 + 64 for _ in range(2))
    ramp = np.linspace(0, 1, side)[:, None, None]
    pixels = top * (1 - ramp) + bottom * ramp + noise.normal(0, 14, (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, mask: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    """Bytes and ending, in one of the forms that people have."""
    kind, buffer = rng.choices(list(_KINDS), list(_KINDS.values()))[0], io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG")
    elif kind == "rgba":
        image.putalpha(mask.filter(ImageFilter.MaxFilter(9)))
        image.save(buffer, "PNG")
    elif kind == "webp":
        image.save(buffer, "WEBP", quality=rng.randint(60, 95))
    elif kind == "turned":
        exif = Image.Exif()
        exif[_ORIENTATION] = _TURNED
        image.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=90, exif=exif)
    else:
        image.save(buffer, "JPEG", quality=rng.randint(60, 95))
    return buffer.getvalue(), {"rgba": "png", "turned": "jpg"}.get(kind, kind)


if __name__ == "__main__":
    sys.exit(run_command(write_problem, sys.argv[1:], __doc__ or ""))
