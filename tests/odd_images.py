"""Image files with all that may stand in their headers, right and wrong; and what a consumer makes of them with Pillow alone."""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps

from data.images.decode import Pixels

SHORT, LONG = 3, 4
_TYPES = [*range(1, 14), 16, 99]


def consumers_pixels(content: bytes) -> Pixels | None:
    """What Pillow reads and turns; None where it refuses the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except (OSError, SyntaxError, ValueError):
            return None
        return np.asarray(_turned(image).convert("RGB"))


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # it cannot read the EXIF block, or cannot write what is left of it without the orientation
        pass
    try:
        orientation = image.getexif()[0x0112]
    except Exception:
        return image
    plain = Image.fromarray(np.asarray(image.convert("RGB")))
    plain.getexif()[0x0112] = orientation
    return ImageOps.exif_transpose(plain)


def encode(image: np.ndarray | Image.Image, file_format: str, **options: object) -> bytes:
    """Pillow's encoding."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, file_format, **options)
    return buffer.getvalue()


# JPEG


def segment(marker: int, payload: bytes, length: int | None = None) -> bytes:
    """A JPEG segment; `length` claims another one."""
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2 if length is None else length) + payload


def with_header(jpeg: bytes, *pieces: bytes) -> bytes:
    """The JPEG with these in the place of all application segments before its tables."""
    at = 2
    while 0xE0 <= jpeg[at + 1] <= 0xEF:
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:2] + b"".join(pieces) + jpeg[at:]


def exif(orientation: int, order: str = "<", kind: int = SHORT, count: int = 1, more: Sequence[bytes] = ()) -> bytes:
    """A whole EXIF block, with `Exif\\0\\0`; `more` are other entries of 12 bytes, before the orientation."""
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + value(orientation, order, kind).ljust(4, b"\0")[:4]
    head = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(more) + entry
    return b"Exif\0\0" + head + struct.pack(order + "IH", 8, len(entries) // 12) + entries + bytes(4)


def value(number: int, order: str, kind: int) -> bytes:
    """A number as a TIFF value of this type."""
    if kind in (3, 8):
        return struct.pack(order + "H", number)
    if kind in (4, 9, 13):
        return struct.pack(order + "I", number)
    return struct.pack(order + "f", number) if kind == 11 else bytes([number])


def xmp(orientation: int, as_element: bool = False) -> bytes:
    """An XMP packet."""
    said = (
        f"><tiff:Orientation>{orientation}</tiff:Orientation><" if as_element else f' tiff:Orientation="{orientation}" '
    )
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description' + said.encode() + b"/></x:xmpmeta>"


XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"


_SOUND = [(0x010F, 2, 4, 7), (0x011A, 5, 1, 8), (0x0128, 3, 1, 2), (0x0132, 2, 12, 8), (0x0213, 3, 1, 1)]
"""Tag, type, count and value of entries; those over four bytes are somewhere within the block."""


def random_exif(rng: random.Random) -> bytes:
    """An EXIF block: half of them sound, some cut off, some with odd types, counts and places."""
    order = rng.choice("<>")
    if rng.random() < 0.5:
        sound = [struct.pack(order + "HHII", *entry) for entry in rng.sample(_SOUND, rng.randrange(4))]
        return exif(rng.randrange(10), order, rng.choice([SHORT, LONG]), 1, sound) + rng.randbytes(rng.choice([0, 8]))
    kind, count = rng.choice([SHORT, LONG, *_TYPES]), rng.choice([1, 1, 1, 1, 0, 2, 3])
    block = exif(rng.randrange(10), order, kind, count, _odd_entries(rng, order))
    block = rng.choice([b"", b"", b"", b"Exif\0\0"]) + block + rng.randbytes(rng.choice([0, 0, 8, 40]))
    if rng.random() < 0.2:
        block = block[: rng.randrange(6, len(block))]
    return damaged(rng, block, 6) if rng.random() < 0.2 else block


def _odd_entries(rng: random.Random, order: str) -> list[bytes]:
    tags = [0x010F, 0x0110, 0x0112, 0x011A, 0x0128, 0x0132, 0x8769, 0xABCD]
    counts, values = [0, 1, 1, 1, 2, 3, 9, 1 << 16], [1, 2, 8, 14, 30, 1 << 20, (1 << 32) - 1]
    return [
        struct.pack(
            order + "HHII", tag, rng.choice([2, SHORT, LONG, 5, *_TYPES]), rng.choice(counts), rng.choice(values)
        )
        for tag in sorted(rng.sample(tags, rng.choice([0, 0, 1, 2, 3])))
    ]


def damaged(rng: random.Random, content: bytes, start: int = 0) -> bytes:
    """One byte from `start` on is another one."""
    changed = bytearray(content)
    if len(content) > start:
        changed[rng.randrange(start, len(content))] = rng.randrange(256)
    return bytes(changed)


_PREFIXES = {
    b"JFIF\0": 0xE0, b"JFXX\0": 0xE0, b"Adobe": 0xEE, b"ICC_PROFILE\0": 0xE2, b"Photoshop 3.0\0": 0xED, b"MPF\0": 0xE2, b"FPXR\0": 0xE2,
    b"Exif\0\0": 0xE1, XMP_PREFIX: 0xE1, b"Exif": 0xE1, b"": 0xE1,
}  # fmt: skip


def _application(rng: random.Random) -> bytes:
    prefix, marker = rng.choice(list(_PREFIXES.items()))
    size = rng.choice([0, 1, 2, 5, 7, 9, 14, 60])
    payload = prefix + (rng.randbytes(size) if rng.random() < 0.5 else bytes(size))
    cut = rng.random() < 0.2  # the first letter is missing
    return segment(marker if rng.random() < 0.8 else rng.randrange(0xE0, 0xF0), payload[cut:])


def _resources(rng: random.Random) -> bytes:
    one = b"8BIM" + struct.pack(">H", rng.choice([0x03ED, 0x0404, 1]))
    pieces = [one + b"\0\0" + struct.pack(">I", size) + bytes(size + size % 2) for size in rng.choices([0, 3, 16], k=2)]
    tail = rng.choice([b"", b"8BIM", b"8BIM\4", b"8BIM\4\4", b"8BIM\4\4\0", b"8BIM\4\4\0\0", b"8BIM\4\4\x09abc"])
    return segment(0xED, b"Photoshop 3.0\0" + b"".join(pieces[: rng.randrange(3)]) + tail)


_PIECES: list[Callable[[random.Random], bytes]] = [
    _application,
    _resources,
    lambda rng: segment(0xE1, random_exif(rng)),
    lambda rng: segment(0xE1, XMP_PREFIX + xmp(rng.randrange(10), rng.random() < 0.5)),
    lambda rng: segment(0xE0, b"JFIF\0\1\2\1\0\x48\0\x48\0\0"),
    lambda rng: segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([rng.randrange(3)])),
    lambda rng: segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(20)),
    lambda rng: segment(0xFE, rng.randbytes(rng.randrange(20))),
    lambda rng: segment(0xDB, bytes([3]) + bytes([9]) * 64),
    lambda rng: segment(0xDD, b"\0\0"),
    lambda rng: b"\xff" * rng.randrange(1, 4),
    lambda rng: rng.choice([b"\0", b"\xff\0", b"ab", b"\xff\x01", b"\xff\xd0", b"\xff\xd8", b"\xff\xd9", b"\xff\xc8", b"\xff\xf0"]),
    lambda rng: segment(rng.choice([0xE1, 0xEC, 0xFE]), rng.randbytes(4), rng.randrange(8)),
]  # fmt: skip


def random_jpeg(rng: random.Random, jpeg: bytes) -> bytes:
    """The JPEG with other segments before its tables, and some before its first scan."""
    weights = [6, 3, 8, 5, 5, 3, 2, 3, 2, 1, 1, 1, 1]
    pieces = [rng.choices(_PIECES, weights)[0](rng) for _ in range(rng.choice([0, 1, 2, 3, 5]))]
    content = with_header(jpeg, *pieces)
    if rng.random() < 0.2:
        scan = len(content) - len(jpeg) + jpeg.index(b"\xff\xda")
        content = content[:scan] + rng.choices(_PIECES, weights)[0](rng) + content[scan:]
    return damaged(rng, content, 2) if rng.random() < 0.1 else content


# PNG and WebP


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """The PNG with these chunks after its header and before its end."""
    return png[:33] + before + png[33:-12] + after + png[-12:]


def raw_profile(block: bytes) -> bytes:
    """EXIF as ImageMagick writes it into a PNG's text."""
    return b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"


def text(keyword: bytes, content: bytes) -> bytes:
    """A tEXt chunk."""
    return chunk(b"tEXt", keyword + b"\0" + content)


def packed_text(keyword: bytes, content: bytes) -> bytes:
    """A zTXt chunk."""
    return chunk(b"zTXt", keyword + b"\0\0" + zlib.compress(content, 9))


def unicode_text(keyword: bytes, content: bytes, packed: bool = False) -> bytes:
    """An iTXt chunk."""
    return chunk(b"iTXt", keyword + (b"\0\1\0\0\0" + zlib.compress(content, 9) if packed else b"\0\0\0\0\0" + content))


def random_png(rng: random.Random, png: bytes) -> bytes:
    """The PNG with metadata before its pixels and after them."""

    def one() -> bytes:
        words, packet = raw_profile(random_exif(rng)), xmp(rng.randrange(10), rng.random() < 0.5)
        keyword = rng.choice(
            [b"Raw profile type exif", b"Raw profile type exif", b"Raw profile type APP1", b"exif", b"Comment"]
        )
        return rng.choice(
            [
                chunk(b"eXIf", random_exif(rng).removeprefix(b"Exif\0\0")),
                text(keyword, words),
                packed_text(keyword, words),
                unicode_text(keyword, words, rng.random() < 0.5),
                unicode_text(b"XML:com.adobe.xmp", packet, rng.random() < 0.5),
                text(b"XML:com.adobe.xmp", packet),
                chunk(b"iCCP", b"p\0" + rng.choice([b"\0", b"\0", b"\1", b""]) + zlib.compress(bytes(9))),
                chunk(rng.choice([b"zTXt", b"iTXt", b"tEXt", b"prVt", b"gAMA", b"pHYs"]), rng.randbytes(rng.randrange(20))),
            ]
        )  # fmt: skip

    content = with_chunks(png, *(b"".join(one() for _ in range(rng.choice([0, 1, 1, 2]))) for _ in range(2)))
    return damaged(rng, content, 8) if rng.random() < 0.1 else content


def webp_with(webp: bytes, block: bytes = b"", packet: bytes = b"") -> bytes:
    """A simple WebP in the extended form, with an EXIF and an XMP chunk."""
    image = Image.open(io.BytesIO(webp))
    flags = (0x08 if block else 0) | (0x04 if packet else 0)
    canvas = (image.width - 1).to_bytes(3, "little") + (image.height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<II", 10, flags) + canvas + webp[12:]
    for kind, data in ((b"EXIF", block), (b"XMP ", packet)):
        body += kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) if data else b""
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def random_webp(rng: random.Random, webp: bytes) -> bytes:
    """The WebP with metadata."""
    block = random_exif(rng)[rng.choice([0, 6]) :] if rng.random() < 0.7 else b""
    packet = xmp(rng.randrange(10), rng.random() < 0.5) if rng.random() < 0.7 else b""
    return webp_with(webp, block, packet)
