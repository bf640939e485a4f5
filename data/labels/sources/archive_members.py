"""Read samples from a tar that another program may have written, from start to end; every size is checked before reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import BinaryIO

from ...errors import DataError
from ...shards.samples import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, printable, split_member_name
from ...shards.tar_reader import DamagedTarError, Member, read_members
from ...storage.redact import redacted
from ..joined_tar import JSON_FIELD

MAX_JSON_BYTES = 1 << 20


@dataclass(frozen=True)
class ArchivedSample:
    """A sample of an archive: its key, its image's encoded bytes and its `.json`."""

    key: str
    image: bytes
    json: bytes


def archived_samples(file: BinaryIO, url: str) -> Iterator[ArchivedSample]:
    """Samples of one image and one `.json`; other members are skipped. Reads forward only, except to explain an error.

    Raises:
        DataError: the archive is cut short or damaged, has a sample of another form, or a member larger than an image or `.json`
            may be. StorageError: as `file.read`.
    """
    try:
        files = (member for member in read_members(file) if member.is_file)
        for key, members in groupby(files, key=lambda member: split_member_name(printable(member.name))[0]):
            yield _sample(file, key, members, url)
    except DamagedTarError as error:
        raise DataError(f"{redacted(url)}: cut short or damaged ({error}); copy it again") from error


def _sample(file: BinaryIO, key: str, members: Iterable[Member], url: str) -> ArchivedSample:
    images: list[bytes] = []
    texts: list[bytes] = []
    for member in members:
        field = split_member_name(member.name)[1]
        if field not in (*IMAGE_EXTENSIONS, JSON_FIELD):
            continue
        found, maximum = (texts, MAX_JSON_BYTES) if field == JSON_FIELD else (images, MAX_IMAGE_BYTES)
        if found:  # before a second one is read
            raise DataError(f"{redacted(url)}, key {key!r}: expected one image and one .json, but there are several")
        found.append(_content(file, member, maximum, url))
    if not (images and texts):
        raise DataError(f"{redacted(url)}, key {key!r}: expected an image and a .json, as stage=export writes them")
    return ArchivedSample(key, images[0], texts[0])


def _content(file: BinaryIO, member: Member, maximum: int, url: str) -> bytes:
    name = printable(member.name)
    if not member.is_plain:
        raise DataError(f"{redacted(url)}: {name!r} is a link or a special file; expected a file")
    if member.size > maximum:
        raise DataError(f"{redacted(url)}: {name!r} has {member.size:,} bytes; expected {maximum:,} at most")
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise DataError(f"{redacted(url)}: cut short within {name!r}; copy it again")
    return content
