"""Find the four files of Fashion-MNIST: of its Debian package, from a mirror, or from that package downloaded; and read them."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

import numpy as np

from .errors import DataError
from .recipes.packages import last_line, unpacked_debian

_DEBIAN_PACKAGE = "dataset-fashion-mnist"
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
)
_TIMEOUT_S = 5
_SHA256 = {  # of the uncompressed files; mirrors compress them differently
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_IDX_HEADER = {"images": 16, "labels": 8}  # bytes


def find_files() -> dict[str, bytes]:
    """Name → content of the four uncompressed IDX files, from the first place that has them all undamaged.

    Raises DataError when no place has them; the message lists the places and why each failed.
    """
    places: dict[str, Callable[[str], bytes]] = {str(_DEBIAN_FOLDER): lambda name: (_DEBIAN_FOLDER / name).read_bytes()}
    for mirror in _MIRRORS:
        places[mirror] = lambda name, mirror=mirror: _download(f"{mirror}/{name}")  # type: ignore[misc]
    tried = []
    with tempfile.TemporaryDirectory() as folder:
        places[f"apt-get download {_DEBIAN_PACKAGE}"] = lambda name: (
            unpacked_debian(_DEBIAN_PACKAGE, Path(folder)) / _DEBIAN_FOLDER.relative_to("/") / name
        ).read_bytes()
        for place, read in places.items():
            try:
                return {name: _checked(name, read(name)) for name in _SHA256}
            except (OSError, EOFError, zlib.error, HTTPException, DataError, subprocess.SubprocessError) as error:
                tried.append(f"  {place}: {last_line(error)}")
    raise DataError(
        "Fashion-MNIST was not found. Tried:\n" + "\n".join(tried) + f"\nInstall the Debian package {_DEBIAN_PACKAGE} "
        f"(apt-get install {_DEBIAN_PACKAGE}), or put the four .gz files into {_DEBIAN_FOLDER}, and run again."
    )


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        return bytes(response.read())


def _checked(name: str, packed: bytes) -> bytes:
    content = gzip.decompress(packed)
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise DataError(f"{name} is not the published file (its digest differs)")
    return content


def read_idx(files: dict[str, bytes], part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, 28, 28) and labels uint8 (N,) of part `train` or `t10k`."""
    images = np.frombuffer(files[f"{part}-images-idx3-ubyte.gz"], np.uint8, offset=_IDX_HEADER["images"])
    labels = np.frombuffer(files[f"{part}-labels-idx1-ubyte.gz"], np.uint8, offset=_IDX_HEADER["labels"])
    return images.reshape(-1, 28, 28), labels
