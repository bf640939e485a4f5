"""Of many images with one perceptual hash the max_images confident are kept, whatever the memory and the order of reading."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.config import load_config
from teacher.executors import Threads
from teacher.selection.copies import write_all_copies
from teacher.selection.hash_groups import find_hash_groups
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import HashGroups, SelectRule, tie_hash
from tests.teacher.selection.test_select import ordinal_of, read_copies, write_labels

RULE = SelectRule(num_classes=2, confidence_threshold=0.3, per_class=None, max_copies=1)
Rows = list[tuple[int, float, int]]  # label, confidence, hash

rows = st.tuples(st.integers(0, 1), st.sampled_from([0.1, 0.3, 0.5, 0.9]), st.sampled_from([0, 7, 2**63, 2**64 - 1]))
files = st.lists(st.lists(rows, max_size=30), min_size=1, max_size=4)


def write(folder: Path, shards: dict[str, Rows]) -> None:
    for name, content in shards.items():
        hashes = pa.array([value for _, _, value in content], pa.uint64())
        write_labels(folder, {name: [(label, confidence) for label, confidence, _ in content]}, image_hash=hashes)


def kept_of(shards: dict[str, Rows], max_images: int, excluded: set[tuple[str, int]]) -> dict[str, list[int]]:
    """The expected copies, by sorting each group."""
    groups: dict[int, list[tuple[float, int, str, int]]] = {}
    for name, content in shards.items():
        for position, (_, confidence, value) in enumerate(content):
            if np.float32(confidence) >= np.float32(0.3) and (name, position) not in excluded:
                tie = int(tie_hash(name, np.array([ordinal_of(position)], np.int32))[0])
                groups.setdefault(value, []).append((confidence, tie, name, position))
    kept = {(name, position) for group in groups.values() for _, _, name, position in sorted(group)[::-1][:max_images]}
    return {name: [int((name, n) in kept) for n in range(len(content))] for name, content in shards.items()}


def groups_of(
    folder: str, shards: list[str], max_images: int, exclusions: Exclusions | None = None, **options: Any
) -> HashGroups:
    options = {"counter_bits": 4} | options
    return find_hash_groups(LabelSource(folder, RULE, exclusions or Exclusions()), shards, max_images, **options)


@settings(max_examples=60, deadline=None)
@given(
    files=files,
    max_images=st.sampled_from([1, 2, 5, 300]),
    max_rows=st.sampled_from([1, 7, 1000]),
    num_workers=st.sampled_from([1, 3]),
    order=st.randoms(use_true_random=False),
)
def test_rows_that_stay_are_those_of_sorting_each_group(
    files: list[Rows], max_images: int, max_rows: int, num_workers: int, order: Any
) -> None:
    shards = {f"s{number}": content for number, content in enumerate(files)}
    names = list(shards)
    order.shuffle(names)
    excluded = {("s0", 0)}
    exclusions = Exclusions(held_out_samples={"s0": [0]})
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), shards)
        groups = groups_of(name, names, max_images, exclusions, threads=Threads(num_workers), max_rows=max_rows)
        selection = select_shards(LabelSource(name, RULE, Exclusions({"s0": [0]}, hash_groups=groups)), list(shards))
        counts = write_all_copies(selection, list(shards), f"{name}/out")
        copies = read_copies(Path(name) / "out", list(shards))
    expected = kept_of(shards, max_images, excluded)
    assert copies == expected
    for shard, content in shards.items():
        fit = sum(c >= 0.3 and (shard, n) not in excluded for n, (_, c, _) in enumerate(content))
        assert counts[shard].near_duplicate == fit - sum(expected[shard])


@pytest.mark.parametrize("max_images", [1, 254, 255, 256, 400])
def test_more_images_of_one_hash_than_a_counter_can_count(tmp_path: Path, max_images: int) -> None:
    write(tmp_path, {"a": [(0, 0.5, 7)] * 200, "b": [(0, 0.9, 7)] * 200, "c": [(0, 0.9, 8)] * 3})
    groups = groups_of(str(tmp_path), ["a", "b", "c"], max_images, counter_bits=27)
    selection = select_shards(LabelSource(str(tmp_path), RULE, Exclusions(hash_groups=groups)), ["a", "b", "c"])
    write_all_copies(selection, ["a", "b", "c"], str(tmp_path / "out"))
    kept = {name: sum(copies) for name, copies in read_copies(tmp_path / "out", ["a", "b", "c"]).items()}
    assert kept == {"a": max(0, min(max_images, 400) - 200), "b": min(max_images, 200), "c": min(max_images, 3)}


def test_a_limit_of_none_is_refused_with_its_field() -> None:
    with pytest.raises(ValueError, match=r"select\.max_near_duplicates=0: input should be greater than or equal to 1"):
        load_config(None, ["select.max_near_duplicates=0"])
