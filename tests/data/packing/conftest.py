"""Class folders of photos."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import png

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def photos(tmp_path: Path, digits: Digits) -> Path:
    """Class folders `one`, `two` with 10 images each."""
    for number, image in enumerate(digits[0][:20]):
        write(tmp_path / "photos" / ("one" if number < 10 else "two") / f"{number}.png", png(image))
    return tmp_path / "photos"


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
