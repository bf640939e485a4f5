"""Write emoji (64 × 64 pixels, in colour) of two vendors as labeled, validation and test shards; classes are Unicode's categories.

    python -m data.recipes.emoji out=datasets/emoji [seed=0]

The images are of the npm packages emoji-datasource-google and -twitter, downloaded by npm. Both vendors' images of an emoji are in
one split. Variants of skin tone are left out. Licences of the images: Apache 2.0 (Noto Emoji), CC BY 4.0 (Twemoji).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..settings import run_command
from .packages import from_npm
from .split_writing import LabeledImage, on_white, write_recipe

LICENCE = (
    "Apache 2.0: Noto Emoji, Google; CC BY 4.0: Twemoji, Twitter and contributors; categories: emoji-datasource (MIT)"
)
SIDE = 64
CLASS_NAMES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion", "Symbols",
    "Travel & Places",
)  # fmt: skip
_VERSION = "16.0.0"
_SHA256 = {  # of the packages' archives, by vendor
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}


def prepare(out: str, seed: int = 0) -> None:
    """Write the splits below `out`, unless they are complete.

    Raises DataError when the packages cannot be had, or `out` has other files.
    """
    write_recipe("emoji", out, seed, LICENCE, _read)


def _read(folder: Path) -> tuple[list[LabeledImage], tuple[str, ...]]:
    return [image for vendor in _SHA256 for image in _images(vendor, folder)], CLASS_NAMES


def _images(vendor: str, folder: Path) -> Iterator[LabeledImage]:
    pictures = f"img/{vendor}/{SIDE}/"
    wanted = (pictures, "emoji.json")
    package = from_npm(
        f"emoji-datasource-{vendor}", _VERSION, _SHA256[vendor], folder, lambda path: path.startswith(wanted)
    )
    for emoji in json.loads((package / "emoji.json").read_text()):
        if emoji[f"has_img_{vendor}"] and emoji["category"] in CLASS_NAMES:
            with Image.open(package / pictures / emoji["image"]) as image:
                yield LabeledImage(emoji["unified"], CLASS_NAMES.index(emoji["category"]), on_white(image, SIDE))


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
