"""`load_image`: the pixels that the pipeline sees, from a path, a URL or bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.images.decode import decode
from data.images.load import load_image


def half_transparent() -> bytes:
    """A PNG: its left half is red, its right half is transparent (and black below, as programs write it)."""
    pixels = np.zeros((4, 8, 4), np.uint8)
    pixels[:, :4] = (255, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_transparency_is_white_where_convert_makes_it_black(tmp_path: Path) -> None:
    content = half_transparent()
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, str(tmp_path / "a.png"), tmp_path / "a.png"):
        image = load_image(source)
        assert (image.mode, image.size) == ("RGB", (8, 4))
        assert (np.array(image) == decode(content)).all()
        assert (image.getpixel((0, 0)), image.getpixel((7, 3))) == ((255, 0, 0), (255, 255, 255))
    with Image.open(tmp_path / "a.png") as image:
        assert image.convert("RGB").getpixel((7, 3)) == (0, 0, 0)


def test_a_photo_of_a_phone_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90°
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (4, 8)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt cannot be decoded \(not a JPEG, PNG or WebP file"):
        load_image(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"an image of 4 bytes cannot be decoded"):
        load_image(b"text")
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        load_image(tmp_path / "b.png")
