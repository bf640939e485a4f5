"""The user's list of keys to exclude from training: `key` in every shard, `shard/key` in one shard."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from data import storage
from data.errors import DataError


def read_keys(url: str | None) -> frozenset[str]:
    """The lines of a text file of keys; empty without a file. See `keys_in`.

    Raises:
        DataError: there is no such file, or it is not a text file.
    """
    if url is None:
        return frozenset()
    try:
        lines = storage.read_text(url).removeprefix("\ufeff").splitlines()  # a byte order mark
        return frozenset(line.strip() for line in lines) - {""}
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude={url}: expected a text file of keys, one a line ({error})") from error


@lru_cache(maxsize=8)
def keys_in(lines: frozenset[str], shard: str) -> frozenset[str]:
    """The keys that `lines` exclude in a shard, by its name (without `.tar`)."""
    own = _by_shard(lines).get(shard)
    return lines | own if own else lines


def is_excluded(lines: frozenset[str], shard: str, keys: Sequence[str]) -> np.ndarray:
    """Which keys of a shard `lines` exclude, bool [n]. As `keys_in`, without building a set of all keys per shard."""
    own = _by_shard(lines).get(shard, frozenset())
    return np.fromiter((key in lines or key in own for key in keys), bool, len(keys))


@lru_cache(maxsize=2)
def keys_digest(lines: frozenset[str]) -> str:
    """Hex digest of lines as a set, empty for none. Cached: a million lines take a second."""
    return _digest(lines) if lines else ""


@lru_cache(maxsize=2)
def _by_shard(lines: frozenset[str]) -> dict[str, frozenset[str]]:
    keys: dict[str, set[str]] = {}
    for line in lines:
        shard, slash, key = line.partition("/")
        if slash:
            keys.setdefault(shard, set()).add(key)
    return {shard: frozenset(some) for shard, some in keys.items()}


def exclude_inputs(url: str | None) -> dict[str, str]:
    """What the list adds to a stage's fingerprint inputs: `exclude`, its digest as a set. Raises as `read_keys`."""
    if url is None:
        return {}
    return {"exclude": _digest(read_keys(url))}


def _digest(lines: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
