"""The order of training images: exact, seeded, and a function of position."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.training_order import Order

copies_of_shards = st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=7).filter(
    lambda shards: any(map(sum, shards))
)


def make(copies: list[list[int]], **changes: object) -> Order:
    options = {"seed": 0, "name": "test", "window_shards": 3} | changes
    return Order([np.array(shard, np.uint16) for shard in copies], **options)  # type: ignore[arg-type]


def triples(order: Order, start: int, count: int) -> list[tuple[int, int, int, int]]:
    entries = order.take(start, count)
    return list(
        zip(*(part.tolist() for part in (entries.epoch, entries.shard, entries.row, entries.copy)), strict=True)
    )


@settings(deadline=None)
@given(copies_of_shards)
def test_an_epoch_has_each_row_exactly_as_often_as_its_copies_say(copies: list[list[int]]) -> None:
    order = make(copies)
    seen = Counter((shard, row) for _, shard, row, _ in triples(order, 0, order.num_entries))
    expected = {(s, r): n for s, shard in enumerate(copies) for r, n in enumerate(shard) if n}
    assert seen == expected
    assert {entry[0] for entry in triples(order, 0, order.num_entries)} == {0}


@settings(deadline=None)
@given(copies_of_shards, st.integers(0, 60), st.integers(1, 40))
def test_a_slice_from_anywhere_equals_the_same_part_of_the_whole(
    copies: list[list[int]], start: int, count: int
) -> None:
    whole = triples(make(copies), 0, start + count)
    assert triples(make(copies), start, count) == whole[start:]


def test_epochs_seeds_and_names_have_different_orders() -> None:
    copies = [[1] * 50] * 4
    epochs = [[entry[1:] for entry in triples(make(copies), epoch * 200, 200)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert triples(make(copies), 0, 200) != triples(make(copies, seed=1), 0, 200)
    assert triples(make(copies), 0, 200) != triples(make(copies, name="other"), 0, 200)
    assert triples(make(copies), 0, 200) == triples(make(copies), 0, 200)


def test_samples_mix_across_the_shards_of_a_window() -> None:
    first = [shard for _, shard, _, _ in triples(make([[1] * 100] * 6), 0, 60)]
    assert len(set(first)) == 3


def test_copies_of_an_image_lie_in_different_passes_over_its_shard() -> None:
    order = make([[5] * 20 for _ in range(20)], window_shards=4)
    position: dict[tuple[int, int], list[int]] = {}
    for place, (_, shard, row, _) in enumerate(triples(order, 0, order.num_entries)):
        position.setdefault((shard, row), []).append(place)
    spread = np.mean([max(places) - min(places) for places in position.values()])
    assert spread > order.num_entries / 3


def test_a_stream_without_images_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the labeled stream has no images"):
        make([[0, 0]], name="labeled")
