"""Samples of a tar that somebody else may have written, read from start to end; what is held in memory is bounded."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from data.labels.joined_tar import JSON_FIELD
from data.shards.samples import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, split_member_name
from data.shards.split import DataError
from data.storage.redact import redacted
from data.storage.retry import StorageError

MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = (
    1 << 13
)  # of a pax or GNU header before a member; `tarfile` holds it, and takes its length squared in time
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_BLOCK = 1 << 18
# what `tarfile` raises for damaged headers; RecursionError for many extended ones in a row
_DAMAGED = (tarfile.TarError, ValueError, LookupError, ArithmeticError, EOFError, RecursionError)


class Readable(Protocol):
    """A file that is read once."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""


@dataclass(frozen=True)
class ArchivedSample:
    """A sample as the archive has it."""

    key: str
    image: bytes
    json: bytes


def archived_samples(file: Readable, url: str) -> Iterator[ArchivedSample]:
    """Each sample with one image and a `.json`; other members are passed over unread.

    Raises:
        DataError: cut short or damaged; a sample of another form; a member larger than an image or a `.json` may be.
        StorageError: as the file.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=_BLOCK, tarinfo=_BoundedInfo) as tar:  # type: ignore[call-overload]
            for key, members in groupby(tar, key=lambda member: split_member_name(member.name)[0]):
                yield _sample(tar, key, members, url)
    except (DataError, StorageError):
        raise
    except _DAMAGED as error:
        raise DataError(f"{redacted(url)}: cut short or damaged ({error}); copy it again") from error


class _BoundedInfo(tarfile.TarInfo):
    """A header that does not make `tarfile` read much."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
        """As tarfile's; raises ReadError for an extended header of many bytes."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _EXTENDED and info.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {info.size:,} bytes; expected {_MAX_HEADER_BYTES:,} at most")
        return info


def _sample(tar: tarfile.TarFile, key: str, members: Iterable[tarfile.TarInfo], url: str) -> ArchivedSample:
    images: list[bytes] = []
    texts: list[bytes] = []
    for member in members:
        field = split_member_name(member.name)[1]
        if field not in (*IMAGE_EXTENSIONS, JSON_FIELD):
            continue
        found, most = (texts, MAX_JSON_BYTES) if field == JSON_FIELD else (images, MAX_IMAGE_BYTES)
        if found:  # before a second one is read
            raise DataError(f"{redacted(url)}, key {key!r}: expected one image and one .json, but there are several")
        found.append(_content(tar, member, most, url))
    if not (images and texts):
        raise DataError(f"{redacted(url)}, key {key!r}: expected an image and a .json, as stage=export writes them")
    return ArchivedSample(key, images[0], texts[0])


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int, url: str) -> bytes:
    if not member.isreg() or member.issparse():
        raise DataError(f"{redacted(url)}: {member.name!r} is a link or a special file; expected a file")
    if not 0 <= member.size <= most:
        raise DataError(f"{redacted(url)}: {member.name!r} has {member.size:,} bytes; expected {most:,} at most")
    stream = tar.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name!r}: {len(content)} bytes of {member.size}")
    return content
