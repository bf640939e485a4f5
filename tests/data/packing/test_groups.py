"""Images that must not part: copies of one file, views of one object."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.packing.folders import ImageFile
from data.packing.groups import merged, same_bytes, same_name, split


def test_without_groups_the_split_is_that_of_earlier_versions() -> None:
    labels = np.random.default_rng(1).integers(0, 7, 500)
    order = np.random.default_rng(3).permutation(500)
    held_out = np.zeros(500, bool)
    for label in range(7):
        members = order[labels[order] == label]
        held_out[members[: min(len(members) - 1, max(1, round(0.1 * len(members))))]] = True
    found = split(labels, np.arange(500), 0.1, 3)
    assert found["labeled"].tolist() == order[~held_out[order]].tolist()
    assert found["validation"].tolist() == order[held_out[order]].tolist()


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Labels, groups, share, seed."""
    count = draw(st.integers(1, 60))
    labels = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    number = draw(st.integers(1, count))  # of groups
    names = draw(st.lists(st.integers(0, number), min_size=count, max_size=count))
    groups = merged(count, [[i for i, other in enumerate(names) if other == name and name] for name in set(names)])
    return np.array(labels), groups, draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.9])), draw(st.integers(0, 9))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_groups_never_part_and_shares_are_kept(problem: tuple[np.ndarray, np.ndarray, float, int]) -> None:
    labels, groups, share, seed = problem
    parts = split(labels, groups, share, seed)
    everything = np.concatenate(list(parts.values()))
    assert sorted(everything.tolist()) == list(range(len(labels)))
    held_out = np.zeros(len(labels), bool)
    held_out[parts.get("validation", np.array([], int))] = True
    for group in np.unique(groups):
        assert len(set(held_out[groups == group].tolist())) == 1
    for label in np.unique(labels):
        mine, size = labels == label, int((labels == label).sum())
        held = int((held_out & mine).sum())
        assert held < size, "a class keeps an image to train on"
        assert share or not held
        if len(np.unique(groups)) == len(labels):
            assert held == (min(size - 1, max(1, round(share * size))) if share else 0)


@settings(max_examples=50, deadline=None)
@given(problems())
def test_one_group_for_each_class_never_goes_beyond_the_share_by_more_than_its_smallest(
    problem: tuple[np.ndarray, np.ndarray, float, int],
) -> None:
    labels, groups, share, seed = problem
    groups = merged(
        len(labels), [np.flatnonzero((groups == g) & (labels == c)).tolist() for g in groups for c in range(5)]
    )
    held = split(labels, groups, share, seed).get("validation", np.array([], int))
    for label in np.unique(labels):
        wanted = max(1, round(share * (labels == label).sum()))
        smallest = min(int(((groups == g) & (labels == label)).sum()) for g in np.unique(groups[labels == label]))
        assert (labels[held] == label).sum() <= max(wanted, smallest)


def write(folder: Path, files: dict[str, bytes]) -> list[ImageFile]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [ImageFile(folder / name, len(content)) for name, content in files.items()]


def test_copies_are_found_by_their_bytes_and_not_by_name_size_or_middle(tmp_path: Path) -> None:
    large = bytes(100_000)
    files = {
        "a.jpg": b"one", "a (1).jpg": b"one", "b.jpg": b"two", "c.jpg": large, "d.jpg": b"x" + large[1:], "e.jpg": large,
    }  # fmt: skip
    assert same_bytes(write(tmp_path, files)) == [[0, 1], [3, 5]]


def test_which_files_are_read_does_not_depend_on_their_order(tmp_path: Path) -> None:
    images = write(tmp_path, {f"{n}.jpg": bytes([n % 3]) * (n % 4) for n in range(24)})
    expected = {frozenset(images[i].path.name for i in group) for group in same_bytes(images)}
    random.Random(0).shuffle(images)
    assert {frozenset(images[i].path.name for i in group) for group in same_bytes(images)} == expected


def test_views_of_one_object_are_told_by_a_pattern_of_their_name() -> None:
    names = ["cup/1_view1.jpg", "cup/1_view2.jpg", "cup/2_view1.jpg", "plate/1_view1.jpg", "plate/other.jpg"]
    assert same_name(names, r"^(.*)_view\d+") == [[0, 1], [2], [3]]
    assert same_name(names, r"(\d+)_view\d+") == [[0, 1, 3], [2]]
    assert same_name(names, r"^\w+/\d+") == [[0, 1], [2], [3]], "without parentheses by the match"
    assert merged(5, [[0, 1], [1, 3]]).tolist() == [0, 0, 2, 0, 4]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("(a)(b)", "expected one pair of parentheses"),
        (r"^(IMG\d+)", "found in none of the 1 names below images=, such as 'cup/1.jpg'"),
    ],
)
def test_a_pattern_that_cannot_group_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        same_name(["cup/1.jpg"], pattern)
