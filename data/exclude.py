"""The user's list of keys that are never to be trained on."""

from __future__ import annotations

import hashlib

from data import storage
from data.manifest import DataError


def read_keys(url: str | None) -> frozenset[str]:
    """The keys of a text file with one a line; none without a file.

    Raises:
        DataError: no such file, or not a text file.
    """
    if url is None:
        return frozenset()
    try:
        return frozenset(storage.read_text(url).splitlines()) - {""}
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude={url}: expected a text file of keys, one a line ({error})") from error


def exclude_inputs(url: str | None) -> dict[str, str]:
    """What a list adds to the inputs of a stage's fingerprint: `exclude`, its digest as a set. Raises as `read_keys`."""
    if url is None:
        return {}
    lines = "\n".join(sorted(read_keys(url)))
    return {"exclude": hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:16]}
