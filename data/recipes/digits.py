"""Write scikit-learn's 1,797 handwritten digits (8 × 8 pixels, 10 classes) as labeled, validation and test shards.

    python -m data.recipes.digits out=datasets/digits [seed=0]

Licence of the images: CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..settings import run_command
from .split_writing import LabeledImage, write_recipe

LICENCE = (
    "CC BY 4.0: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI machine learning repository"
)
_SCALE = 255 / 16  # the package's pixels are 0 to 16


def prepare(out: str, seed: int = 0) -> None:
    """Write the splits below `out`, unless they are complete. Raises DataError when `out` has other files."""
    write_recipe("digits", out, seed, LICENCE, _read)


def _read(folder: Path) -> tuple[list[LabeledImage], list[str]]:  # noqa: ARG001 (the package has the images)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn has these images: pip install scikit-learn, and give this command again"
        ) from error
    found = load_digits()
    pixels = np.round(found.images * _SCALE).astype(np.uint8)
    images = [LabeledImage(str(n), int(label), pixels[n]) for n, label in enumerate(found.target)]
    return images, [str(digit) for digit in range(10)]


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
