"""The user's list of keys that are never to be trained on: `key` in whatever shard it occurs, `shard/key` in that shard."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from data import storage
from data.manifest import DataError


def read_keys(url: str | None) -> frozenset[str]:
    """The lines of a text file of keys; none without a file. `keys_in` says what they mean for a shard.

    Raises:
        DataError: no such file, or not a text file.
    """
    if url is None:
        return frozenset()
    try:
        lines = storage.read_text(url).removeprefix("\ufeff").splitlines()  # editors put the mark there
        return frozenset(line.strip() for line in lines) - {""}
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude={url}: expected a text file of keys, one a line ({error})") from error


@lru_cache(maxsize=8)
def keys_in(lines: frozenset[str], shard: str) -> frozenset[str]:
    """The keys that lines exclude in the shard of a name (without `.tar`)."""
    own = _by_shard(lines).get(shard)
    return lines | own if own else lines


@lru_cache(maxsize=2)
def _by_shard(lines: frozenset[str]) -> dict[str, frozenset[str]]:
    keys: dict[str, set[str]] = {}
    for line in lines:
        shard, slash, key = line.partition("/")
        if slash:
            keys.setdefault(shard, set()).add(key)
    return {shard: frozenset(some) for shard, some in keys.items()}


def exclude_inputs(url: str | None) -> dict[str, str]:
    """What a list adds to the inputs of a stage's fingerprint: `exclude`, its digest as a set. Raises as `read_keys`."""
    if url is None:
        return {}
    lines = "\n".join(sorted(read_keys(url)))
    return {"exclude": hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()[:16]}
