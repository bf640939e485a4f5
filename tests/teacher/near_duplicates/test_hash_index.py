"""Close hashes are found without comparing all pairs, as comparing all pairs finds them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.near_duplicates import hash_index
from teacher.near_duplicates.hash_index import COMPLETE_DISTANCE, HashIndex

hashes = st.integers(0, 2**64 - 1)
flips = st.lists(st.integers(0, 63), max_size=12)


def found(index: HashIndex, queries: np.ndarray, max_distance: int) -> dict[tuple[int, int], int]:
    return {
        (int(query), int(reference)): int(bits)
        for pairs in index.pairs(queries, max_distance)
        for query, reference, bits in zip(*pairs, strict=True)
    }


def brute_force(references: np.ndarray, queries: np.ndarray, max_distance: int) -> dict[tuple[int, int], int]:
    bits = np.bitwise_count(queries[:, None] ^ references[None])
    return {(int(q), int(r)): int(bits[q, r]) for q, r in np.argwhere(bits <= max_distance)}


@settings(max_examples=150, deadline=None)
@given(references=st.lists(hashes, max_size=20), copies=st.lists(st.tuples(st.integers(0, 19), flips), max_size=20))
def test_all_pairs_within_seven_bits_are_found(references: list[int], copies: list[tuple[int, list[int]]]) -> None:
    known = np.array(references, np.uint64)
    queries = [
        (references[n % len(references)] if references else 0) ^ sum({1 << b for b in bits}) for n, bits in copies
    ]
    asked = np.array(queries, np.uint64)
    index = HashIndex(known)
    assert found(index, asked, COMPLETE_DISTANCE) == brute_force(known, asked, COMPLETE_DISTANCE)
    beyond = brute_force(known, asked, 12)
    assert found(index, asked, 12).items() <= beyond.items()


def test_many_hashes_that_share_their_bands_are_compared_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_index, "_MAX_PAIRS", 100)
    monkeypatch.setattr(hash_index, "_MAX_QUERIES", 64)
    generator = np.random.default_rng(0)
    references, queries = (generator.integers(0, 2**10, count, dtype=np.uint64) for count in (300, 200))
    index = HashIndex(references)
    assert found(index, queries, COMPLETE_DISTANCE) == brute_force(references, queries, COMPLETE_DISTANCE)
    assert max(len(pairs.query) for pairs in index.pairs(queries, 7)) <= 300


def test_hashes_eight_bits_apart_are_found_unless_each_band_differs_in_two() -> None:
    near, far = 0b11111111, 0b11 << 48 | 0b11 << 32 | 0b11 << 16 | 0b11
    assert found(HashIndex(np.zeros(1, np.uint64)), np.array([near, far], np.uint64), 10) == {(0, 0): 8}


@pytest.mark.parametrize(("references", "queries"), [([], [1, 2]), ([1, 2], []), ([], [])])
def test_nothing_is_close_to_nothing(references: list[int], queries: list[int]) -> None:
    index = HashIndex(np.array(references, np.uint64))
    assert not found(index, np.array(queries, np.uint64), 64)
