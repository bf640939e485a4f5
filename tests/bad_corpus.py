"""A corpus of everything that goes wrong in foreign shards, from two real photos: `python -m tests.bad_corpus out=DIR`.

Deterministic. What ends up in quarantine is in bad_corpus_ledger.csv. So that the offsets there hold for any version of
Pillow and zlib, no member whose size an encoder decides comes before a bad one in the same shard, but for members of one block.
"""

from __future__ import annotations

import functools
import gzip
import io
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from data.settings import run_command
from tests import odd_images as odd
from tests.odd_images import chunk, encode, segment, with_chunks, with_header

BLOCK = tarfile.BLOCKSIZE
WIDTH, HEIGHT = 96, 64
LONG_KEY = "long/" + "k" * 195

Entry = tuple[str | tarfile.TarInfo, bytes]  # a member's name, or its whole header, and its content


@functools.lru_cache
def photo(name: str = "china.jpg", left: int = 0) -> np.ndarray:
    """A piece of a real photo, uint8 (HEIGHT, WIDTH, 3)."""
    whole = load_sample_image(name)[:384, left : left + 576]
    return np.asarray(Image.fromarray(np.ascontiguousarray(whole)).resize((WIDTH, HEIGHT)))


def png(width: int, height: int, depth: int, colour: int, compressed: bytes) -> bytes:
    """A PNG file around its compressed rows, whatever they are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def stored_png(image: np.ndarray) -> bytes:
    """A PNG of uint8 (H, W, 3) whose size depends on no compressor."""
    rows = np.pad(image.reshape(len(image), -1), ((0, 0), (1, 0))).tobytes()
    assert len(rows) < 65_536
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    return png(image.shape[1], image.shape[0], 8, 2, stored + struct.pack(">I", zlib.adler32(rows)))


def deep_png(image: np.ndarray) -> bytes:
    """A PNG of uint16 (H, W, 3), which Pillow cannot write."""
    rows = np.pad(image.astype(">u2").view(np.uint8).reshape(len(image), -1), ((0, 0), (1, 0)))
    return png(image.shape[1], image.shape[0], 16, 2, zlib.compress(rows.tobytes()))


def black_png(width: int, height: int) -> bytes:
    """A PNG of one bit per pixel: a few kB for any number of pixels."""
    return png(width, height, 1, 0, zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9))


def without_adobe_marker(jpeg: bytes) -> bytes:
    """A JPEG without its APP14 segment: nothing says that its inks are inverted, as all that write CMYK have it."""
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]


def palette_png() -> tuple[bytes, np.ndarray]:
    """The photo in 64 colours, the most frequent one transparent, and the pixels that it decodes to."""
    indexed = Image.fromarray(photo()).quantize(64)
    palette = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    index = np.asarray(indexed)
    clear = int(np.bincount(index.ravel()).argmax())
    pixels = palette[index]
    pixels[index == clear] = 255
    return encode(indexed, "PNG", transparency=clear), pixels


_STORED_AS: dict[
    int, Callable[[np.ndarray], np.ndarray]
] = {  # what a camera stores, so that orientation n shows the photo
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: shown.swapaxes(0, 1)[::-1],
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: shown.swapaxes(0, 1)[:, ::-1],
}


def turned(orientation: int) -> bytes:
    """A JPEG that shows the same photo for each EXIF orientation."""
    stored = np.ascontiguousarray(_STORED_AS[orientation](photo()))
    return encode(stored, "JPEG", quality=97, subsampling=0, exif=odd.exif(orientation))


def turned_otherwise() -> dict[str, tuple[str, bytes]]:
    """The same photo, stored as for orientation 6, which stands where few writers put it: key → extension and content."""
    stored = np.ascontiguousarray(_STORED_AS[6](photo()))
    jpeg, png_file = encode(stored, "JPEG", quality=97, subsampling=0), encode(stored, "PNG")
    exif, comment = segment(0xE1, odd.exif(6)), segment(0xFE, b"by hand")
    profile = odd.packed_text(b"Raw profile type exif", odd.raw_profile(odd.exif(6)))
    return {
        "exif-after-comment": ("jpg", with_header(jpeg, comment, exif)),
        "exif-after-padding": ("jpg", with_header(jpeg, b"\xff\xff", exif)),
        "exif-as-long": ("jpg", with_header(jpeg, segment(0xE1, odd.exif(6, ">", odd.LONG)))),
        "raw-profile": ("png", with_chunks(png_file, profile)),
        "xmp": ("jpg", with_header(jpeg, segment(0xE1, odd.XMP_PREFIX + odd.xmp(6)))),
    }


def refused_headers() -> list[Entry]:
    """JPEGs that libjpeg reads and Pillow refuses, of one block each; and one that both would decode for minutes."""
    grey = encode(photo()[:8, :8, 0], "JPEG", quality=50, optimize=True)
    tall = encode(np.zeros((2048, 2048), np.uint8), "JPEG", progressive=True)
    scan = tall[tall.rindex(b"\xff\xda") :][:10]
    jfif = segment(0xE0, b"JFIF\0\1\2\0\0\1\0\1\0\0")
    return [
        ("short-jfif.jpg", with_header(grey, segment(0xE0, b"JFIF\0"))),
        ("short-adobe.jpg", with_header(grey, jfif, segment(0xEE, b"Adobe"))),
        ("short-profile.jpg", with_header(grey, jfif, segment(0xE2, b"ICC_PROFILE\0"))),
        ("good.jpg", with_header(grey, jfif)),
        ("scans.jpg", tall[:-2] + scan * 30_000 + tall[-2:]),
    ]


@functools.lru_cache
def decodable() -> dict[str, tuple[str, bytes, np.ndarray]]:
    """Odd images that can be labeled: key → extension, content, and the pixels to expect (up to JPEG noise)."""
    shown = photo()
    grey = np.asarray(Image.fromarray(shown).convert("L"))
    ink = Image.fromarray(shown).convert("CMYK")
    plain = encode(shown, "JPEG", quality=95)
    frames = [Image.fromarray(shown), Image.fromarray(photo("flower.jpg"))]
    wide = np.repeat(photo()[:20, :1], 20_000, axis=1)
    palette, palette_pixels = palette_png()
    alpha = np.dstack([shown, np.full(shown.shape[:2], 255, np.uint8)])
    alpha[:10, :, 3] = 0
    alpha_pixels = np.where(alpha[..., 3:] == 0, 255, shown).astype(np.uint8)
    images: dict[str, tuple[str, bytes, np.ndarray]] = {
        "progressive": ("jpg", encode(shown, "JPEG", quality=95, progressive=True), shown),
        "grey": ("jpg", encode(grey, "JPEG", quality=95), np.repeat(grey[..., None], 3, 2)),
        "restart-markers": ("jpeg", encode(shown, "JPEG", quality=95, restart_marker_blocks=3), shown),
        "cmyk-adobe": ("jpg", encode(ink, "JPEG", quality=95), shown),
        "cmyk": ("jpg", without_adobe_marker(encode(ink, "JPEG", quality=95)), shown),
        "trailing-garbage": ("jpg", plain + b"\0garbage\xff\xd8\xff" * 50, shown),
        "bad-exif": ("jpg", encode(shown, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), shown),
        "16-bit-grey": ("png", encode(grey.astype(np.uint16) * 256 + 77, "PNG"), np.repeat(grey[..., None], 3, 2)),
        "16-bit-colour": ("png", deep_png(shown.astype(np.uint16) * 256 + 77), shown),
        "palette": ("png", palette, palette_pixels),
        "alpha": ("webp", encode(alpha, "WEBP", lossless=True, exact=True), alpha_pixels),
        "animation": ("webp", encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), shown),
        "one-pixel": ("png", stored_png(shown[:1, :1]), shown[:1, :1]),
        "wide": ("jpg", encode(wide, "JPEG", quality=95), wide),
        "long-text": ("png", with_chunks(stored_png(shown), odd.packed_text(b"Comment", b"text" * 500_000)), shown),
        "thread": ("png", encode(wide[:1], "PNG"), wide[:1]),  # resized like a photo it would take 4 GB
    }
    images |= {key: (*entry, shown) for key, entry in turned_otherwise().items()}
    return images | {f"exif-{n}": ("jpg", turned(n), shown) for n in range(1, 9)}


def damaged_images() -> list[Entry]:
    """Each bad in its own way, with good ones between."""
    good, tiny = stored_png(photo()), Image.fromarray(photo()[:8, :8])
    return [
        ("good-1.png", good),
        ("truncated.jpg", encode(photo(), "JPEG", quality=95)[:2000]),
        ("cut.png", good[:5000]),
        ("empty.jpg", b""),
        ("text.jpg", b"this is not an image\n"),
        ("html.jpg", b"<!DOCTYPE html><title>404 Not Found</title>"),
        ("bmp.jpg", encode(tiny, "BMP")),
        ("gif.jpg", encode(tiny, "GIF")),
        ("tiff.jpg", encode(tiny, "TIFF")),
        (header("folder", tarfile.DIRTYPE), b""),
        ("folder/in.png", good),
        (header("symbolic.jpg", tarfile.SYMTYPE, "good-1.png"), b""),
        (header("hard.png", tarfile.LNKTYPE, "good-1.png"), b""),
        ("._good-1.png", b"\0\5\26\7\0\2\0\0Mac OS X        "),
        ("label-without-image.cls", b"3"),
        ("image-without-label.png", good),
        ("labeled.cls", b"2"),
        ("labeled.png", good),
        ("named-label.cls", b"cat"),
        ("named-label.png", good),
        ("huge-label.cls", b"99999999999"),
        ("huge-label.png", good),
        ("readme", b"no extension\n"),
        ("claims-to-be-huge.png", png(60_000, 60_000, 8, 2, b"")),
        ("good-2.png", good),
        ("too-long.png", black_png(100_000, 1)),
        ("bomb.png", black_png(12_000, 12_000)),
    ]


def header(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    """A member's header."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def tar(entries: Sequence[Entry], tar_format: int = tarfile.GNU_FORMAT, **options: Any) -> bytes:
    """A tar of regular files, or of whatever the headers say."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format, **options) as archive:
        for name, content in entries:
            info = name if isinstance(name, tarfile.TarInfo) else header(name, size=len(content))
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def damaged_header(tar_bytes: bytes, size_field: bytes) -> bytes:
    """The first member's size replaced, with the right checksum."""
    head = bytearray(tar_bytes[:BLOCK])
    head[124:136] = size_field
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + tar_bytes[BLOCK:]


def odd_keys() -> list[Entry]:
    """Keys that occur twice, name two images, are no UTF-8, or have separators in them; and a plain one."""
    good, other = stored_png(photo()), stored_png(photo("flower.jpg"))
    names = [
        "twice.png",
        "latin-\udce9.png",
        "photo.v1.png",
        "photo.v2.png",
        "twice.png",
        "twice.png",
        "a/b.png",
        "plain.png",
    ]
    return [(name, good if n % 2 else other) for n, name in enumerate(names)]


def largest() -> bytes:
    """A shard with the largest image that is decoded: 64 megapixels."""
    return tar([("largest.png", black_png(8192, 8192))])


def shards() -> dict[str, bytes]:
    """File name → content."""
    three: list[Entry] = [(f"{n}.png", stored_png(photo(left=8 * n))) for n in range(3)]
    whole = tar(three)
    second = whole.index(b"1.png\0")
    long_keys = [(f"{LONG_KEY}{n}.png", stored_png(photo(left=n))) for n in range(2)]
    return {
        "all-bad.tar": tar([(f"{n}.jpg", b"nothing") for n in range(3)]),
        "cut-at-member.tar": whole[:second],
        "cut-in-header.tar": whole[: second + 100],
        "cut-in-image.tar": whole[: second + BLOCK + 1000],
        "damaged-images.tar": tar(damaged_images()),
        "empty.tar": tar([]),
        "gzip.tar": gzip.compress(whole, mtime=0),
        "headers.tar": tar(refused_headers()),
        "joined.tar": whole + whole,
        "keys.tar": tar(odd_keys()),
        "long-keys-gnu.tar": tar(long_keys, tarfile.GNU_FORMAT),
        "long-keys-pax.tar": tar(long_keys, tarfile.PAX_FORMAT, pax_headers={"comment": "for all members"}),
        "negative-size.tar": damaged_header(whole, b"\xff" * 10 + struct.pack(">h", -BLOCK)),
        "no-tar.tar": b"<!DOCTYPE html><title>403 Forbidden</title>" * 20,
        "odd-images.tar": tar([(f"{key}.{entry[0]}", entry[1]) for key, entry in decodable().items()]),
        "zero-bytes.tar": b"",
    }


def write_corpus(out: str) -> None:
    """Write the shards to the folder `out`."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in shards().items():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(run_command(write_corpus, sys.argv[1:], "python -m tests.bad_corpus out=DIR"))
