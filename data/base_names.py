"""Check file names from others' manifests and pointers: only base names, so that nothing outside their folder is read."""

from __future__ import annotations

import io
from contextlib import suppress

from . import storage
from .errors import DataError
from .storage.redact import redacted

_MAX_NAME = 255  # bytes; the limit of file systems
_SHOWN = 60  # characters of a wrong name in a message
_POINTER_BYTES = 1024
_TRIES = 3


def is_base_name(name: str) -> bool:
    """Whether a text can be the name of a file in a folder: no path, not `..`, no control characters, at most 255 bytes."""
    is_path = any(sign in name for sign in "/\\") or name in ("", ".", "..")
    return not is_path and name.isprintable() and len(name.encode("utf-8")) <= _MAX_NAME


def check_base_name(name: str, where: str) -> str:
    """Return `name`. Raises DataError when it is no base name; `where` is the file that gives it, for the message."""
    if not is_base_name(name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        raise DataError(
            f"{redacted(where)}: it names {shown!r}; expected the name of a file beside it, without a folder"
        )
    return name


def read_pointer(url: str) -> str:
    """The name in a small text file such as `latest`. Raises DataError when it is no base name, and FileNotFoundError."""
    try:
        return check_base_name(read_limited(url, _POINTER_BYTES).decode("utf-8").strip(), url)
    except UnicodeDecodeError as error:
        raise DataError(f"{redacted(url)}: expected a name in UTF-8 ({error})") from None


def read_limited(url: str, max_bytes: int) -> bytes:
    """The content of a file. Raises DataError, without reading it, when it has more than `max_bytes`; else as `storage.open_read`."""
    for _ in range(_TRIES - 1):
        with suppress(storage.ChangedError):  # replaced since it was opened
            return _read_limited(url, max_bytes)
    return _read_limited(url, max_bytes)


def _read_limited(url: str, max_bytes: int) -> bytes:
    with storage.open_read(url) as file:
        size = file.seek(0, io.SEEK_END)
        if size > max_bytes:
            raise DataError(f"{redacted(url)}: {size:,} bytes; expected {max_bytes:,} at most")
        file.seek(0)
        return file.read(size)
