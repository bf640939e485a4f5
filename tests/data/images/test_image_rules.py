"""One rule for what is an image and which way is up: Pillow's, in every path from bytes to pixels."""

from __future__ import annotations

import io
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from data.images import decode as images
from data.images import png_chunks
from data.images.clean_view import EvalView
from data.images.decode import DecodeError, Pixels, decode, decode_fast, jpeg_shape
from data.images.jpeg_header import MAX_SCANS
from data.images.orientation import orientation_in_exif, without_warnings
from data.images.similarity import image_hash, thumbnail
from pipeline.core.schema import AugmentConfig
from pipeline.inputs.train_transform import TrainTransform
from tests import odd_images as odd
from tests.odd_images import consumers_pixels, encode, segment, with_chunks, with_header

WIDTH, HEIGHT = 48, 33
MEAN = (0.4, 0.5, 0.6)


def training(crop: str, decoder: str) -> Callable[[bytes], np.ndarray]:
    augment = AugmentConfig(crop=crop, num_ops=0, hflip=0)
    transform = TrainTransform(augment, 32, "bicubic", MEAN, decoder)  # type: ignore[arg-type]
    return lambda content: transform.from_file(content, 7)[0].numpy()


def view(mode: str, decoder: str) -> EvalView:
    return EvalView(32, 0.875, "bicubic", mode, decoder)  # type: ignore[arg-type]


PATHS: dict[str, Callable[[bytes], Any]] = {
    "decode": decode,
    "decode_fast": decode_fast,
    "hash": lambda content: image_hash(decode(content)),
    "thumbnail": lambda content: thumbnail(decode_fast(content, 16)),
    "hash and view": lambda content: view("crop", "fast").with_hash(content)[1],
    **{f"view {mode} {decoder}": view(mode, decoder) for mode in ("crop", "pad") for decoder in ("fast", "pillow")},
    **{
        f"training {crop} {decoder}": training(crop, decoder)
        for crop in ("random_resized_crop", "pad_crop")
        for decoder in ("fast", "pillow")
    },
}


@lru_cache
def photo() -> Pixels:
    return np.asarray(Image.fromarray(load_sample_image("china.jpg")).resize((WIDTH, HEIGHT)))


@lru_cache
def jpeg(mode: str = "RGB", **options: object) -> bytes:
    return encode(Image.fromarray(photo()).convert(mode), "JPEG", quality=90, **options)


@lru_cache
def png() -> bytes:
    return encode(photo(), "PNG")


@lru_cache
def webp() -> bytes:
    return encode(photo(), "WEBP")


def agree(content: bytes, expected: Pixels | None) -> None:
    """Every path refuses the file, or sees what it sees in a PNG of the expected pixels."""
    plain = None if expected is None else encode(expected, "PNG")
    for name, path in PATHS.items():
        seen = seen_by(path, content)
        assert (seen is None) == (plain is None), name
        if plain is not None:
            np.testing.assert_array_equal(seen, path(plain), name)


def seen_by(path: Callable[[bytes], Any], content: bytes) -> Any | None:
    """None where it refuses the file."""
    try:
        return path(content)
    except DecodeError:
        return None


JFIF = segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\0\0")
COMMENT = segment(0xFE, b"made by hand")
TABLE = segment(0xDB, b"\3" + b"\1" * 64)
EXIF_6 = segment(0xE1, odd.exif(6))
RAW_6 = odd.raw_profile(odd.exif(6))
TURNED = {
    "EXIF after JFIF and COM": with_header(jpeg(), JFIF, COMMENT, EXIF_6),
    "EXIF after DQT": with_header(jpeg(), JFIF, TABLE, EXIF_6),
    "EXIF after a fill byte": with_header(jpeg(), JFIF, b"\xff", EXIF_6),
    "EXIF after a padded COM": with_header(jpeg(), b"\xff\xff\xff", COMMENT, b"\xff\xff", EXIF_6),
    "EXIF after another APP1": with_header(jpeg(), segment(0xE1, b"FLIR\0" + bytes(40)), EXIF_6),
    "EXIF between tables and scan": jpeg().replace(b"\xff\xda", EXIF_6 + b"\xff\xda", 1),
    "EXIF in two segments": with_header(
        jpeg(), segment(0xE1, odd.exif(6)[:20]), segment(0xE1, b"Exif\0\0" + odd.exif(6)[20:])
    ),
    "EXIF in a grey JPEG": with_header(jpeg("L"), COMMENT, EXIF_6),
    "EXIF in a CMYK JPEG": with_header(jpeg("CMYK"), COMMENT, segment(0xEE, b"Adobe\0d\0\0\0\0\0"), EXIF_6),
    **{
        f"EXIF {order} as type {kind}": with_header(jpeg(), segment(0xE1, odd.exif(6, order, kind)))
        for order in "<>"
        for kind in (odd.SHORT, odd.LONG)
    },
    "XMP in a JPEG": with_header(jpeg(), segment(0xE1, odd.XMP_PREFIX + odd.xmp(6))),
    "XMP in a JPEG, as an element": with_header(jpeg(), JFIF, segment(0xE1, odd.XMP_PREFIX + odd.xmp(6, True))),
    "XMP beside EXIF that says nothing": with_header(
        jpeg(), segment(0xE1, odd.exif(6).replace(b"\x12\1", b"\x13\1")), segment(0xE1, odd.XMP_PREFIX + odd.xmp(6))
    ),
    "eXIf": with_chunks(png(), odd.chunk(b"eXIf", odd.exif(6)[6:])),
    "eXIf after the pixels": with_chunks(png(), after=odd.chunk(b"eXIf", odd.exif(6, ">", odd.LONG)[6:])),
    "raw profile in tEXt": with_chunks(png(), odd.text(b"Raw profile type exif", RAW_6)),
    "raw profile in zTXt": with_chunks(png(), odd.packed_text(b"Raw profile type exif", RAW_6)),
    "raw profile in zTXt after the pixels": with_chunks(png(), after=odd.packed_text(b"Raw profile type exif", RAW_6)),
    "raw profile in iTXt": with_chunks(png(), odd.unicode_text(b"Raw profile type exif", RAW_6, packed=True)),
    "XMP in a PNG": with_chunks(png(), odd.unicode_text(b"XML:com.adobe.xmp", odd.xmp(6))),
    "EXIF in a WebP": odd.webp_with(webp(), odd.exif(6)),
    "EXIF in a WebP, without prefix": odd.webp_with(webp(), odd.exif(6, ">", odd.LONG)[6:]),
    "XMP in a WebP": odd.webp_with(webp(), packet=odd.xmp(6)),
}
UPRIGHT = {
    "EXIF is asked before XMP": with_header(
        jpeg(), segment(0xE1, odd.exif(1)), segment(0xE1, odd.XMP_PREFIX + odd.xmp(6))
    ),
    "an orientation that is none": with_header(jpeg(), segment(0xE1, odd.exif(0))),
    "EXIF in a comment": with_header(jpeg(), segment(0xFE, odd.exif(6))),
    "EXIF in APP2": with_header(jpeg(), segment(0xE2, odd.exif(6))),
    "EXIF after the image": jpeg() + EXIF_6,
    "several pictures": with_header(jpeg(), segment(0xE2, b"MPF\0II*\0" + bytes(60))),
}
REFUSED = {
    **{f"JFIF of {n}": with_header(jpeg(), segment(0xE0, b"JFIF\0\1"[:n])) for n in (4, 5, 6)},
    **{f"Adobe of {n}": with_header(jpeg(), JFIF, segment(0xEE, b"Adobe\0"[:n])) for n in (5, 6)},
    **{f"ICC of {n}": with_header(jpeg(), JFIF, segment(0xE2, b"ICC_PROFILE\0\1"[:n])) for n in (12, 13)},
    "resource without a name": with_header(jpeg(), segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4")),
    "resolution of one letter": with_header(
        jpeg(), segment(0xE1, odd.exif(1, more=[b"\x1a\1\2\0\1\0\0\0007\0\0\0", b"\x28\1\3\0\1\0\0\0\2\0\0\0"]))
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_every_path_turns_what_pillow_turns(name: str) -> None:
    content = TURNED[name]
    with Image.open(io.BytesIO(content)) as image:
        sideways = np.asarray(image.convert("RGB"))
    assert sideways.shape == (HEIGHT, WIDTH, 3)
    agree(content, np.rot90(sideways, -1))
    np.testing.assert_array_equal(consumers_pixels(content), np.rot90(sideways, -1))


@pytest.mark.parametrize("name", UPRIGHT)
def test_no_path_turns_what_pillow_leaves_upright(name: str) -> None:
    agree(UPRIGHT[name], decode(jpeg()))
    np.testing.assert_array_equal(consumers_pixels(UPRIGHT[name]), decode(jpeg()))


@pytest.mark.parametrize("name", REFUSED)
def test_every_path_refuses_what_pillow_refuses(name: str) -> None:
    """libjpeg reads these: they were labeled, and then stopped the DataLoader of whoever used the labels."""
    assert consumers_pixels(REFUSED[name]) is None
    agree(REFUSED[name], None)


def test_ycck_has_pillows_pixels_bit_for_bit() -> None:
    """libjpeg-turbo's own way from YCCK to RGB is a level off."""
    adobe = jpeg("CMYK").index(b"Adobe")
    ycck = jpeg("CMYK")[: adobe + 11] + b"\2" + jpeg("CMYK")[adobe + 12 :]
    expected = consumers_pixels(ycck)
    assert expected is not None
    assert not np.array_equal(expected, decode(jpeg("CMYK")))
    agree(ycck, expected)


@pytest.mark.parametrize("part", range(4))
def test_random_headers_have_one_verdict_and_one_set_of_pixels_in_every_path(part: int) -> None:
    """The slow paths see a tenth of the files; 60,000 were tried when this was written."""
    rng = random.Random(part)
    bases = [
        jpeg(),
        jpeg(progressive=True),
        jpeg(subsampling=0),
        jpeg(restart_marker_blocks=2),
        jpeg("L"),
        jpeg("CMYK"),
    ]
    plain = refused = 0
    for number in range(300):
        content = rng.choices(
            [
                lambda: odd.random_jpeg(rng, rng.choice(bases)),
                lambda: odd.random_png(rng, png()),
                lambda: odd.random_webp(rng, webp()),
            ],
            [7, 2, 1],
        )[0]()
        expected = consumers_pixels(content)
        if number % 10 == 0:
            agree(content, expected)
        for path in (decode, decode_fast):
            seen = seen_by(path, content)
            assert (seen is None) == (expected is None), (part, number)
            if expected is not None:
                np.testing.assert_array_equal(seen, expected, f"{part}, {number}")
        plain += jpeg_shape(content) is not None
        refused += expected is None
    assert plain > 50
    assert refused > 15


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"II*\0", b""]), st.binary(max_size=80))
def test_exif_that_is_read_here_says_what_pillow_reads_in_it(head: bytes, tail: bytes) -> None:
    read_here(b"Exif\0\0" + head + tail)


def read_here(block: bytes) -> int | None:
    found = orientation_in_exif(block)
    if found is not None:
        image = Image.new("RGB", (2, 1))
        image.info["exif"] = block
        with without_warnings():  # about what comes after the entries
            tag = image.getexif().get(0x0112)
        assert found == (0 if tag is None else tag if tag in range(1, 9) else 1)
    return found


def test_sound_exif_is_read_here() -> None:
    blocks = [odd.random_exif(random.Random(seed)) for seed in range(2000)]
    assert sum(read_here(block) is not None for block in blocks) > 500
    for orientation in range(1, 9):
        for order in "<>":
            for kind in (odd.SHORT, odd.LONG):
                assert read_here(odd.exif(orientation, order, kind)) == orientation


# Metadata of megabytes

LONG = b"word " * 400_000
LONG_TEXT = {
    "zTXt": with_chunks(png(), odd.packed_text(b"Comment", LONG)),
    "iTXt": with_chunks(png(), odd.unicode_text(b"Comment", LONG, packed=True)),
    "after the pixels": with_chunks(png(), after=odd.packed_text(b"Comment", LONG)),
    "profile": with_chunks(png(), odd.chunk(b"iCCP", b"p\0\0" + zlib.compress(LONG))),
    "all": with_chunks(
        png(), odd.packed_text(b"a", LONG) + odd.unicode_text(b"b", LONG, packed=True), odd.text(b"c", LONG)
    ),
}


@pytest.mark.parametrize("name", LONG_TEXT)
def test_a_png_with_two_megabytes_of_metadata_has_its_pixels(name: str) -> None:
    agree(LONG_TEXT[name], photo())


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_text_of_about_pillows_limit_is_read(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 100)
    agree(with_chunks(png(), odd.packed_text(b"a", b"x" * (100 + size))), photo())


def test_an_orientation_in_long_metadata_is_applied() -> None:
    packet = odd.xmp(6).replace(b"<rdf", LONG + b"<rdf")
    agree(with_chunks(png(), odd.unicode_text(b"XML:com.adobe.xmp", packet, packed=True)), np.rot90(photo(), -1))
    profile = odd.raw_profile(odd.exif(6) + bytes(1_000_000))
    agree(with_chunks(png(), odd.packed_text(b"Raw profile type exif", profile)), np.rot90(photo(), -1))


def test_text_that_unpacks_to_more_than_the_limit_is_refused_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_chunks, "MAX_TEXT", 3_000_000)
    bomb = with_chunks(png(), odd.packed_text(b"Comment", bytes(100_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError, match="MAX_TEXT_CHUNK"):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    agree(with_chunks(png(), odd.packed_text(b"a", LONG) + odd.packed_text(b"b", LONG)), None)
    agree(with_chunks(png(), odd.packed_text(b"a", LONG)), photo())


def test_long_text_with_a_wrong_checksum_is_refused() -> None:
    content = bytearray(LONG_TEXT["zTXt"])
    content[content.index(b"Comment")] += 1
    agree(bytes(content), None)


# Files that take long


def scans(count: int) -> bytes:
    """A progressive JPEG with its last scan again and again."""
    content = jpeg(progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * (count - content.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_too_many_scans_is_refused_by_every_path() -> None:
    agree(scans(MAX_SCANS), consumers_pixels(scans(MAX_SCANS)))
    agree(scans(MAX_SCANS + 1), None)
    with pytest.raises(DecodeError, match="JPEG of more than 100 scans"):
        decode(scans(5000))


def test_thousands_of_empty_scans_are_refused_at_once() -> None:
    content = encode(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") :][:10]
    bomb = content[:-2] + last * 30_000 + b"\xff\xd9"
    start = time.process_time()
    for path in (decode, decode_fast):
        with pytest.raises(DecodeError, match="scans"):
            path(bomb)
    assert time.process_time() - start < 5  # it took minutes


def test_the_scans_of_a_sequential_jpeg_are_counted_too() -> None:
    content = jpeg()
    one = b"\xff\xda" + b"\0\x08\1\1\0\0\x3f\0"  # of the first component alone
    many = content[: content.index(b"\xff\xda")] + one * (MAX_SCANS + 1) + b"\xff\xd9"
    assert jpeg_shape(many) is None
    with pytest.raises(DecodeError, match="scans"):
        decode_fast(many)


def test_scans_that_are_not_the_images_do_not_count() -> None:
    """Of a preview within EXIF, of the video after a motion photo, and what random bytes look like."""
    more = b"\xff\xda\0\2" * 1000
    plain = decode(jpeg(progressive=True))
    for base in (jpeg(progressive=True), jpeg()):
        agree(with_header(base, segment(0xE1, odd.exif(1) + more)), decode(base))
        agree(base + b"\0\2" + more, decode(base))
        agree(with_header(base, JFIF, segment(0xFE, more)), decode(base))
    between = jpeg(progressive=True)
    last = between.rindex(b"\xff\xda")
    agree(between[:last] + segment(0xFE, more) + between[last:], plain)


def test_a_header_that_takes_seconds_to_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_HEADER", 100_000)
    monkeypatch.setattr(images._JpegHeader, "room", 100_000)
    plain = decode(jpeg())
    agree(with_header(jpeg(), COMMENT * 500), plain)
    agree(with_header(jpeg(), b"\xff" * 1000), plain)
    for header in (segment(0xFE, b"") * 2000, b"\xff" * 5000, segment(0xE1, b"Exif\0\0" + bytes(30_000)) * 4):
        with pytest.raises(DecodeError, match="before its pixels"):
            decode_fast(with_header(jpeg(), header))


def test_a_png_of_too_many_chunks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_CHUNKS", 50)
    monkeypatch.setattr(images, "_MAX_COMPRESSED_CHUNKS", 20)
    agree(with_chunks(png(), odd.text(b"a", b"b") * 40), photo())
    with pytest.raises(DecodeError, match="PNG of more than 50 chunks"):
        decode(with_chunks(png(), odd.chunk(b"IDAT", b"") * 60))
    with pytest.raises(DecodeError, match="more than 20 chunks of compressed"):
        decode(with_chunks(png(), odd.packed_text(b"a", b"b") * 21))


def test_incomplete_progressive_files_have_pillows_pixels() -> None:
    """libjpeg smooths blocks whose last scans are missing."""
    content = jpeg(progressive=True)
    starts = [at for at in range(len(content)) if content.startswith(b"\xff\xda", at)]
    for start in starts[1:]:
        cut = content[:start] + b"\xff\xd9"
        agree(cut, consumers_pixels(cut))


def test_exif_transpose_is_the_rule() -> None:
    """As this file's consumer uses it, for every orientation in every place."""
    for orientation in range(10):
        for content in (
            with_header(jpeg(), COMMENT, segment(0xE1, odd.exif(orientation))),
            with_header(jpeg(), segment(0xE1, odd.XMP_PREFIX + odd.xmp(orientation))),
            with_chunks(png(), odd.packed_text(b"Raw profile type exif", odd.raw_profile(odd.exif(orientation)))),
            odd.webp_with(webp(), odd.exif(orientation, ">")),
        ):
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
            np.testing.assert_array_equal(decode(content), expected)
            np.testing.assert_array_equal(decode_fast(content), expected)
