"""What a sample is inside a tar: member names, keys, image and label members. The only module that knows them.

WebDataset's convention: consecutive members with the same name up to the first dot of the base name are one sample; what
follows the dot is the field. Identity is (shard, ordinal); a key is carried along, not trusted to be unique.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_FIELD = "cls"
_WRITABLE_KEY = re.compile(r"[A-Za-z0-9_-]{1,96}")  # plus ".jpeg" stays under ustar's 100 bytes
_COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "xz": b"\xfd7zXZ", "bzip2": b"BZh"}
_LABEL_LIMIT = 32  # bytes; a class index is a few digits
_MAX_LABEL = 1 << 31  # labels are int32
MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""Larger image members are refused unread: the largest image that may be decoded has 192 MiB of pixels."""
_DAMAGED = (tarfile.TarError, EOFError, OverflowError, MemoryError)  # the last two: a header that claims exabytes


@dataclass
class Sample:
    """One sample as the tar has it: where its image bytes lie, and what is wrong with it, if anything."""

    key: str
    extension: str = ""
    image_fields: list[str] = field(default_factory=list)  # the first is the image; `v1.jpg` of `photo.v1.jpg`
    offset: int = 0
    size: int = 0
    label: int | None = None
    label_text: str | None = None  # what the label member holds, its beginning; None without one
    problem: str = ""
    fields: set[str] = field(default_factory=set)


def split_member_name(name: str) -> tuple[str, str]:
    """(key, lower-case field) of a member: `a/b.seg.PNG` → (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def check_key(key: str) -> str:
    """`key` if it may be written: letters, digits, `_`, `-`, at most 96. Raises ValueError otherwise."""
    if not _WRITABLE_KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: expected 1 to 96 letters, digits, '_' or '-' (a dot would split the name)")
    return key


def has_odd_key(sample: Sample) -> bool:
    """Whether a sample's key could not be written again with its image, or names several images."""
    return not _WRITABLE_KEY.fullmatch(sample.key) or sample.image_fields != [sample.extension]


def printable(name: str) -> str:
    """A member name that encodes as UTF-8: undecodable bytes appear as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def iterate_samples(file: BinaryIO) -> Iterator[Sample]:
    """Samples of a tar, in order, reading only headers and labels.

    Where the tar is cut short or damaged, a last sample without a key says so, with the offset; nothing is raised and nothing
    is dropped but folders.
    """
    current: Sample | None = None
    position: int | None = None  # behind the last good member; None: not even a header was read
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            position = 0
            for member in tar:
                if not 0 <= member.size < 1 << 63:  # at a negative size Python's tarfile goes back, and round for ever
                    raise tarfile.ReadError(f"a member of {member.size} bytes")
                position = tar.offset
                if member.isdir():
                    continue
                key, extension = split_member_name(printable(member.name))
                if current is None or current.key != key or extension in current.fields:
                    if current is not None:
                        yield _finished(current)
                    current = Sample(key)
                _add_member(current, tar, member, extension)
            _check_end(file, tar.offset)
    except _DAMAGED as error:
        end = file.seek(0, io.SEEK_END)
        if current is not None:
            if current.offset + current.size > end:
                current.problem = "image cut off by the end of the tar"
            yield _finished(current)
        compression = _compression(file) if position is None else None
        yield Sample("", offset=min(position or 0, end), problem=compression or f"truncated or damaged tar: {error}")
    else:
        if current is not None:
            yield _finished(current)


def _compression(file: BinaryIO) -> str | None:
    """What is wrong with a file that is no tar, if it is a compressed one."""
    file.seek(0)
    start = file.read(8)
    names = [name for name, magic in _COMPRESSED.items() if start.startswith(magic)]
    return f"compressed with {names[0]}; decompress it: images are read by their offset" if names else None


def _check_end(file: BinaryIO, offset: int) -> None:
    """A tar cut at a member boundary reads without any error, and so does the first of several that were joined."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end-of-archive marker")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more data after the end-of-archive marker (several tars in one file?)")


def _add_member(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    sample.fields.add(extension)
    is_plain = member.isreg() and not member.issparse()
    if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
        sample.image_fields.append(extension)
        if len(sample.image_fields) > 1:
            return
        sample.extension = extension.rpartition(".")[2]
        sample.offset, sample.size = member.offset_data, member.size
        if not is_plain:
            sample.problem = "image member is a link, a sparse or a special file; links are not followed"
    elif extension == LABEL_FIELD:
        stream = tar.extractfile(member) if is_plain else None
        text = stream.read(_LABEL_LIMIT).decode("ascii", "replace").strip() if stream else ""
        if text.isdigit() and int(text) < _MAX_LABEL:  # others are no labels; the image is as good as any unlabeled one
            sample.label = int(text)
        sample.label_text = text


def _finished(sample: Sample) -> Sample:
    if not sample.problem and not sample.extension:
        sample.problem = f"no image member ({', '.join(IMAGE_EXTENSIONS)})"
    elif not sample.problem and sample.size == 0:
        sample.problem = "image member is empty"
    elif not sample.problem and sample.size > MAX_IMAGE_BYTES:
        sample.problem = f"image member of {sample.size} bytes, more than the {MAX_IMAGE_BYTES} allowed"
    return sample
