"""The user's list of keys to exclude from training: `key` in every shard, `shard/key` in one shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import storage
from ..errors import DataError
from .key_set import KeySet


class ExcludedKeys:
    """Lines of the list, grouped by shard once: a shard costs by its own keys, however long the list. Can be pickled.

    A line `shard/key` is of the shard of that name (without `.tar`). Any line is also a whole key, in every shard: keys may have
    slashes.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        ordered = sorted(set(lines))
        self._lines = pa.array(ordered, pa.string())
        self._ranges: dict[str, slice] = {}
        start = 0
        for shard, group in groupby(ordered, lambda line: line.partition("/")[0] if "/" in line else None):
            stop = start + sum(1 for _ in group)
            if shard is not None:
                self._ranges[shard] = slice(start, stop)
            start = stop
        self._all_have_slashes = all("/" in line for line in ordered)
        self._whole = KeySet(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def lines(self) -> list[str]:
        """The lines, sorted."""
        return list(self._lines.to_pylist())

    @cached_property
    def digest(self) -> str:
        """Hex digest of the lines as a set. Kept: a million lines take a second."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()[:16]

    def mask(self, shard: str, keys: pa.StringArray) -> np.ndarray:
        """Which of a shard's keys are excluded, bool (N,)."""
        found = np.zeros(len(keys), bool)
        if (own := self._ranges.get(shard)) is not None:
            values = pc.utf8_slice_codeunits(self._lines[own], len(shard) + 1)
            found |= _to_numpy(pc.is_in(keys, value_set=values))
        if len(self) and not (self._all_have_slashes and _lack_slashes(keys)):
            found |= self._whole.contains(keys)
        return found


NOTHING_EXCLUDED = ExcludedKeys()


def _lack_slashes(keys: pa.StringArray) -> bool:
    """Whether no key has a slash; may be False for a slice of an array that has one."""
    characters = keys.buffers()[2]
    return characters is None or b"/" not in characters.to_pybytes()


def _to_numpy(mask: pa.BooleanArray) -> np.ndarray:
    return np.asarray(mask.to_numpy(zero_copy_only=False))


def read_keys(url: str | None) -> ExcludedKeys:
    """The lines of a text file of keys; empty without a file.

    Raises:
        DataError: there is no such file, or it is not a text file.
    """
    if url is None:
        return NOTHING_EXCLUDED
    try:
        text = storage.read_text(url).removeprefix("\ufeff")  # a byte order mark
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise DataError(f"data.exclude={url}: expected a text file of keys, one a line ({error})") from error
    return _grouped(text)


@lru_cache(maxsize=1)  # a command reads its list several times, and a million lines take two seconds
def _grouped(text: str) -> ExcludedKeys:
    return ExcludedKeys(key for line in text.splitlines() if (key := line.strip()))


def exclude_inputs(url: str | None) -> dict[str, str]:
    """What the list adds to a stage's fingerprint inputs: `exclude`, its digest as a set. Raises as `read_keys`."""
    return {} if url is None else {"exclude": read_keys(url).digest}
