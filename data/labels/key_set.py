"""A large set of keys, asked for the keys of one shard after the other.

`pyarrow.compute.is_in` makes its table of the set anew for every shard, and looking up 130 million keys one by one takes minutes. So
hashes of a shard's keys are looked up in one table (NumPy), and only keys whose hash is there, in the set.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_CELLS_PER_KEY = 16  # one key in so many that are not in the set is looked up in vain
_WORD = 8  # bytes hashed at once
_HASHED = 64  # characters; longer keys that end alike are told apart by the set alone
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd


class KeySet:
    """A set of keys. Pickled without its tables, which each process makes of the keys when it needs them."""

    def __init__(self, keys: pa.StringArray) -> None:
        self._keys = keys

    def contains(self, keys: pa.StringArray) -> np.ndarray:
        """Which keys are in the set, bool (N,)."""
        found = self._table[key_hashes(keys) >> self._shift]
        likely = np.flatnonzero(found)
        found[likely] = [key in self._set for key in _as_texts(keys.take(pa.array(likely)))]
        return found

    @cached_property
    def _set(self) -> frozenset[str]:
        return frozenset(_as_texts(self._keys))

    @cached_property
    def _shift(self) -> np.uint64:
        """Low bits of a hash that the table leaves out."""
        return np.uint64(64 - (_CELLS_PER_KEY * max(len(self._keys), 1)).bit_length())

    @cached_property
    def _table(self) -> np.ndarray:
        """Whether a key of the set has a hash with these high bits, bool [2 ** bits]."""
        table = np.zeros(1 << (64 - int(self._shift)), bool)
        table[key_hashes(self._keys) >> self._shift] = True
        return table

    def __getstate__(self) -> dict[str, pa.StringArray]:
        return {"_keys": self._keys}


def key_hashes(keys: pa.StringArray) -> np.ndarray:
    """A hash of the last `_HASHED` characters of each key, uint64 (N,)."""
    if _longest(keys) > _HASHED:
        keys = pc.utf8_slice_codeunits(keys, -_HASHED)
    width = -(-_longest(keys) // _WORD)
    hashes = np.zeros(len(keys), np.uint64)
    padded = pc.ascii_rpad(keys, width * _WORD, "\0")
    words = np.frombuffer(padded.buffers()[2] or b"", "<u8", len(keys) * width)
    for position, word in enumerate(words.reshape(len(keys), width).T, 1):
        factor = np.uint64(pow(_MULTIPLIER, position, 1 << 64))
        hashes += (
            word ^ word >> np.uint64(32)
        ) * factor  # 0 for the zeros behind a key: their number depends on other keys
    hashes ^= hashes >> np.uint64(32)
    return hashes * np.uint64(_MULTIPLIER)


def _longest(keys: pa.StringArray) -> int:
    """Bytes of the longest key."""
    return pc.max(pc.binary_length(keys)).as_py() or 0


def _as_texts(keys: pa.StringArray) -> list[str]:
    return list(keys.to_pylist())
