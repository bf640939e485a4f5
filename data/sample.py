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
_LABEL_LIMIT = 32  # bytes; a class index is a few digits


@dataclass
class Sample:
    """One sample as the tar has it: where its image bytes lie, and what is wrong with it, if anything."""

    key: str
    extension: str = ""
    offset: int = 0
    size: int = 0
    label: int | None = None
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


def printable(name: str) -> str:
    """A member name that encodes as UTF-8: undecodable bytes appear as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def iterate_samples(file: BinaryIO) -> Iterator[Sample]:
    """Samples of a tar, in order, reading only headers and labels.

    Where the tar ends too early, the last sample carries the problem; nothing is raised and nothing is dropped.
    """
    current: Sample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = split_member_name(printable(member.name))
                if current is None or current.key != key or extension in current.fields:
                    if current is not None:
                        yield _finished(current)
                    current = Sample(key)
                _add_member(current, tar, member, extension)
            _check_end(file, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        if current is not None:
            if current.offset + current.size > file.seek(0, io.SEEK_END):
                current.problem = "image cut off by the end of the tar"
            yield _finished(current)
        yield Sample(key="", problem=f"truncated or damaged tar: {error}")
    else:
        if current is not None:
            yield _finished(current)


def _check_end(file: BinaryIO, offset: int) -> None:
    """A tar cut at a member boundary reads without any error; only the missing end-of-archive block tells."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end-of-archive marker")


def _add_member(sample: Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> None:
    sample.fields.add(extension)
    if extension.rpartition(".")[2] in IMAGE_EXTENSIONS and not sample.extension:
        sample.extension = extension.rpartition(".")[2]
        sample.offset, sample.size = member.offset_data, member.size
    elif extension == LABEL_FIELD:
        stream = tar.extractfile(member)
        text = stream.read(_LABEL_LIMIT).decode("ascii", "replace").strip() if stream else ""
        if text.isdigit():
            sample.label = int(text)
        else:
            sample.problem = f"label {text!r} is not a class index"


def _finished(sample: Sample) -> Sample:
    if not sample.problem and not sample.extension:
        sample.problem = f"no image member ({', '.join(IMAGE_EXTENSIONS)})"
    elif not sample.problem and sample.size == 0:
        sample.problem = "image member is empty"
    return sample
