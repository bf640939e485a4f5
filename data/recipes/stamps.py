"""Write Tux Paint's stamps (photos and drawings, shrunk to 64 × 64 pixels) as labeled, validation and test shards.

    python -m data.recipes.stamps out=datasets/stamps [seed=0]

The images are of the Debian package tuxpaint-stamps-default, installed or downloaded by apt-get. A class is a top folder with 12 stamps
or more. A stamp and its mirror image are in one split. Licence of the images: GPL 2, some in the public domain.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from ..errors import DataError
from ..settings import run_command
from .packages import from_debian
from .split_writing import LabeledImage, on_white, write_recipe

LICENCE = "GPL 2, some in the public domain: Tux Paint's stamps, Bill Kendrick and contributors"
SIDE, MIN_IMAGES = 64, 12
_PACKAGE, _FOLDER = "tuxpaint-stamps-default", Path("/usr/share/tuxpaint/stamps")
_VARIANT = re.compile(r"([_-]?(mirror|flip|\d+))+$", re.IGNORECASE)


def prepare(out: str, seed: int = 0) -> None:
    """Write the splits below `out`, unless they are complete.

    Raises DataError when the package cannot be had, or `out` has other files.
    """
    write_recipe("stamps", out, seed, LICENCE, lambda folder: read_stamps(from_debian(_PACKAGE, _FOLDER, folder)))


def read_stamps(folder: Path) -> tuple[list[LabeledImage], list[str]]:
    """Images and class names. Raises DataError where no top folder has enough stamps."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.png"))]
    count = Counter(path.parts[0] for path in files)
    class_names = sorted(name for name, number in count.items() if number >= MIN_IMAGES)
    if len(class_names) < 2:
        raise DataError(f"{folder}: fewer than two folders with {MIN_IMAGES} stamps or more")
    images = []
    for path in files:
        if path.parts[0] in class_names:
            with Image.open(folder / path) as image:
                pixels = on_white(image, SIDE)
            images.append(LabeledImage(thing_of(path), class_names.index(path.parts[0]), pixels))
    return images, class_names


def thing_of(path: Path) -> str:
    """The stamp without the ending that variants have: `animals/frog` of `animals/frog-1.png` and `animals/frog_mirror.png`."""
    return str(path.with_name(_VARIANT.sub("", path.stem) or path.stem))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
