"""Names of files that somebody else's manifest or pointer gives: base names alone, so that nothing outside of its folder is read."""

from __future__ import annotations

import io
from contextlib import suppress

from data import storage
from data.shards.split import DataError
from data.storage.redact import redacted

_LONGEST = 255  # bytes, as file systems have it
_SHOWN = 60
_POINTER_BYTES = 1024
_TRIES = 3


def is_base_name(name: str) -> bool:
    """True for the name of a file in a folder: no path, not `..`, no control characters."""
    is_path = any(sign in name for sign in "/\\") or name in ("", ".", "..")
    return not is_path and name.isprintable() and len(name.encode("utf-8")) <= _LONGEST


def check_base_name(name: str, where: str) -> str:
    """The name, if it is one. Raises DataError for a path or anything else; `where` names the file that gives it."""
    if not is_base_name(name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        raise DataError(
            f"{redacted(where)}: it names {shown!r}; expected the name of a file beside it, without a folder"
        )
    return name


def read_pointer(url: str) -> str:
    """The name in a small text file such as `latest`. Raises DataError where it is none, FileNotFoundError."""
    try:
        return check_base_name(read_limited(url, _POINTER_BYTES).decode("utf-8").strip(), url)
    except UnicodeDecodeError as error:
        raise DataError(f"{redacted(url)}: expected a name in UTF-8 ({error})") from None


def read_limited(url: str, most: int) -> bytes:
    """A whole file of at most `most` bytes. Raises DataError for a larger one, unread; else as `storage.open_read`."""
    for _ in range(_TRIES - 1):
        with suppress(storage.ChangedError):  # replaced since it was opened
            return _read_limited(url, most)
    return _read_limited(url, most)


def _read_limited(url: str, most: int) -> bytes:
    with storage.open_read(url) as file:
        size = file.seek(0, io.SEEK_END)
        if size > most:
            raise DataError(f"{redacted(url)}: {size:,} bytes; expected {most:,} at most")
        file.seek(0)
        return file.read(size)
