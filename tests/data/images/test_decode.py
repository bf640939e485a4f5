"""Decoding by one rule, the clean view, and the perceptual hash."""

from __future__ import annotations

import io
import math
import signal
import struct
import warnings
import zlib
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from data.images import decode as images
from data.images.decode import DecodeError, Pixels, decode
from data.images.resize import eval_transform, window
from data.images.similarity import image_hash
from pipeline.core.interrupt import Interrupted


def encode(image: Image.Image | np.ndarray, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


@lru_cache
def small_photo(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def exif_block(orientation: int, order: str = "<") -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, 1) + entry + bytes(4)


def bits_apart(first: int, second: int) -> int:
    return (first ^ second).bit_count()


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 90})]
)
def test_decode_gives_the_pixels_that_pillow_reads(file_format: str, options: dict[str, Any]) -> None:
    content = encode(small_photo(), file_format, **options)
    pixels = decode(content)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def test_grey_images_get_three_equal_channels() -> None:
    grey = small_photo().convert("L")
    pixels = decode(encode(grey, "PNG"))
    assert pixels.shape == (48, 64, 3)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.asarray(grey))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_in_every_format(file_format: str, orientation: int) -> None:
    content = encode(small_photo(), file_format, exif=exif_block(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    np.testing.assert_array_equal(decode(content), np.asarray(expected))


def test_big_endian_exif_is_understood() -> None:
    assert decode(encode(small_photo(), "JPEG", exif=exif_block(6, ">"))).shape == (64, 48, 3)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        exif_block(6)[:14],
        exif_block(0),
        exif_block(99),
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x01" * 40,
    ],
)
def test_a_bad_exif_block_is_ignored(exif: bytes) -> None:
    plain = decode(encode(small_photo(), "JPEG"))
    np.testing.assert_array_equal(decode(encode(small_photo(), "JPEG", exif=exif)), plain)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparency_is_composited_on_white(file_format: str) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[:, 0] = (200, 0, 0, 255)
    rgba[:, 1] = (200, 0, 0, 0)
    rgba[:, 2] = (200, 0, 0, 51)  # a fifth
    pixels = decode(encode(rgba, file_format, **({"lossless": True, "exact": True} if file_format == "WEBP" else {})))
    np.testing.assert_array_equal(pixels[0], [(200, 0, 0), (255, 255, 255), (244, 204, 204)])


def test_grey_with_alpha_is_composited_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)])
    assert (decode(encode(image, "PNG")) == 255).all()


def test_palette_images_keep_their_colours_and_their_transparent_entries_turn_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    np.testing.assert_array_equal(decode(encode(image, "PNG"))[0], [(255, 0, 0), (0, 0, 255)])
    for transparency in (1, b"\xff\x00"):
        pixels = decode(encode(image, "PNG", transparency=transparency))
        np.testing.assert_array_equal(pixels[0], [(255, 0, 0), (255, 255, 255)])


def test_a_transparent_colour_turns_white() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    pixels = decode(encode(image, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels[0], [(9, 9, 9), (255, 255, 255)])


def test_orientation_and_transparency_go_together() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    pixels = decode(encode(image, "PNG", transparency=(1, 2, 3), exif=exif_block(6)))
    np.testing.assert_array_equal(pixels[:, 0], [(9, 9, 9), (255, 255, 255)])


def test_cmyk_jpegs_become_rgb() -> None:
    pixels = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() < 8


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(decode(encode(ramp, "PNG"))[..., 0], np.arange(256).reshape(16, 16))


def test_16_bit_grey_turns_white_where_it_is_transparent() -> None:
    deep = np.array([[0, 256, 512]], dtype=np.uint16)
    content = encode(deep, "PNG")
    header, rest = content[:33], content[33:]  # signature and IHDR
    chunk = b"tRNS" + struct.pack(">H", 256)
    content = header + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + rest
    np.testing.assert_array_equal(decode(content)[0, :, 0], [0, 255, 2])


@pytest.mark.parametrize("file_format", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encode(
        frames[0],
        file_format,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if file_format == "WEBP" else {}),
    )
    assert (decode(content) == (255, 0, 0)).all()


def test_a_bad_animation_header_does_not_warn() -> None:
    content = encode(small_photo(), "PNG")
    chunk = b"acTL" + struct.pack(">II", 0, 0)
    bad = content[:33] + struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    with pytest.warns(UserWarning, match="APNG"):
        Image.open(io.BytesIO(bad))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(bad), decode(content))


def test_a_decompression_bomb_is_refused_before_its_pixels_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    for file_format in ("PNG", "JPEG", "WEBP"):
        with pytest.raises(DecodeError, match="64×48 pixels, more than the 3071 allowed"):
            decode(encode(small_photo(), file_format))


def test_a_file_that_only_claims_to_be_huge_is_refused_quickly() -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(DecodeError, match="60000×60000"):
        decode(b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", zlib.crc32(b"IDAT")))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_refused(file_format: str) -> None:
    """Cut anywhere: either refused, or (only trailing bytes lost) the same pixels; never half an image."""
    content = encode(small_photo(), file_format)
    whole = decode(content)
    refused = 0
    for length in range(0, len(content), 7):
        try:
            pixels = decode(content[:length])
        except DecodeError:
            refused += 1
        else:
            np.testing.assert_array_equal(pixels, whole)
    assert refused > 0.9 * len(content) / 7


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
)
def test_other_bytes_are_refused_with_a_reason(content: bytes) -> None:
    with pytest.raises(DecodeError, match=r".{10}"):
        decode(content)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damaged_bytes_give_an_image_or_a_decode_error(data: st.DataObject, file_format: str) -> None:
    content = bytearray(encode(small_photo(24, 16), file_format, exif=exif_block(6)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode(bytes(content))
    except DecodeError:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("image_size", "crop_pct"), [(224, 0.875), (160, 0.875), (192, 0.95), (32, 1.0), (33, 0.9)])
@pytest.mark.parametrize("size", [(500, 375), (375, 501), (97, 64), (33, 200), (256, 256)])
def test_the_clean_view_equals_timm_to_the_pixel(
    size: tuple[int, int], image_size: int, crop_pct: float, interpolation: str
) -> None:
    image = small_photo(*size)
    transform = create_transform(
        image_size, is_training=False, crop_pct=crop_pct, interpolation=interpolation, normalize=False
    )
    expected = transform(image).permute(1, 2, 0).numpy()
    view = eval_transform(np.asarray(image), image_size, crop_pct, interpolation)
    np.testing.assert_array_equal(view, expected)


def test_padding_never_resizes() -> None:
    digit = np.full((28, 28, 3), 7, np.uint8)
    view = eval_transform(digit, 32, 1.0, mode="pad")
    np.testing.assert_array_equal(view[2:30, 2:30], digit)
    assert view.sum() == digit.sum()
    np.testing.assert_array_equal(eval_transform(view, 28, 1.0, mode="pad"), digit)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(ValueError, match="'crop' or 'pad', but is 'squash'"):
        eval_transform(np.zeros((4, 4, 3), np.uint8), 4, 1.0, mode="squash")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-12, 12), st.integers(-12, 12), st.integers(1, 9))
def test_a_window_is_the_crop_of_an_endlessly_padded_image(
    height: int, width: int, top: int, left: int, size: int
) -> None:
    image = np.random.default_rng(0).integers(1, 255, (height, width, 3), dtype=np.uint8)
    padded = np.pad(image, ((25, 25), (25, 25), (0, 0)))
    expected = padded[25 + top : 25 + top + size, 25 + left : 25 + left + size]
    np.testing.assert_array_equal(window(image, top, left, size), expected)


PHOTOS = ["china.jpg", "flower.jpg"]


def copies(photo: Pixels) -> list[Pixels]:
    sizes = [(640, 427), (500, 334), (224, 150), (100, 67), (224, 224), (32, 32)]
    resized = [Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC) for size in sizes]
    return [decode(encode(image, "JPEG", quality=quality)) for image in resized for quality in (95, 60)]


@pytest.mark.parametrize("name", PHOTOS)
def test_copies_of_a_photo_have_nearly_the_same_hash(name: str) -> None:
    photo = load_sample_image(name)
    distances = [bits_apart(image_hash(photo), image_hash(copy)) for copy in copies(photo)]
    assert max(distances) <= 8
    assert distances[0] <= 2  # the same size, encoded again


def test_different_photos_have_different_hashes() -> None:
    china, flower = (load_sample_image(name) for name in PHOTOS)
    others = [china, flower, china[:, ::-1], china[::-1], china[:213], flower[:, 320:]]
    hashes = [image_hash(np.ascontiguousarray(photo)) for photo in others]
    assert min(bits_apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > 16


def test_a_hash_is_64_bits_with_half_of_them_set_and_survives_brightening() -> None:
    photo = np.asarray(small_photo())
    value = image_hash(photo)
    assert 0 <= value < 2**64
    assert value.bit_count() == 32
    assert bits_apart(value, image_hash((photo * 0.8).astype(np.uint8))) <= 3


def test_the_hash_is_the_median_of_the_lowest_frequencies() -> None:
    grey = np.asarray(small_photo(40, 40)) @ np.array([0.299, 0.587, 0.114])
    frequencies = np.array(
        [
            [
                sum(
                    grey[y, x] * math.cos(math.pi * u * (y + 0.5) / 40) * math.cos(math.pi * v * (x + 0.5) / 40)
                    for y in range(40)
                    for x in range(40)
                )
                for v in range(1, 9)
            ]
            for u in range(1, 9)
        ]
    ).ravel()
    bits = "".join("1" if value > np.median(frequencies) else "0" for value in frequencies)
    assert image_hash(np.asarray(small_photo(40, 40))) == int(bits, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (8, 8), (2, 5)])
def test_tiny_and_flat_images_have_a_hash_too(shape: tuple[int, int]) -> None:
    assert 0 <= image_hash(np.full((*shape, 3), 77, np.uint8)) < 2**64


def test_a_signal_while_an_image_is_decoded_is_no_damaged_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(content: bytes) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("data.images.decode._open", interrupted)
    with pytest.raises(Interrupted):
        decode(b"any")
