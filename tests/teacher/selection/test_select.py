"""Selection: the same copies as sorting everything, for any worker count, file order and memory limit."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.labels.exclusions import ExcludedKeys
from teacher.executors import Threads
from teacher.selection.copies import ShardCounts, write_all_copies
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.quota_search import plan_copies, select_shards
from teacher.selection.rule import SelectRule, tie_hash
from teacher.selection.selection_file import selection_json

Row = tuple[int, float]  # label, confidence
MASK = 2**64 - 1
FIRST_HASH = 0x81F944D0D0158FC2  # of (shard-000000, 0)


def python_tie_hash(shard: str, ordinal: int) -> int:
    seed = int.from_bytes(hashlib.blake2b(shard.encode(), digest_size=8).digest(), "little")
    z = ((seed ^ ordinal) + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def brute_force(shards: dict[str, list[Row]], rule: SelectRule, gaps: bool = True) -> dict[str, list[int]]:
    """The expected copies, by sorting each class's rows; `gaps` as in `write_labels`."""
    copies = {shard: [0] * len(rows) for shard, rows in shards.items()}
    for label in range(rule.num_classes):
        ranked = sorted(
            (
                (np.float32(confidence), python_tie_hash(shard, ordinal_of(position, gaps)), shard, position)
                for shard, rows in shards.items()
                for position, (row_label, confidence) in enumerate(rows)
                if row_label == label and np.float32(confidence) >= np.float32(rule.confidence_threshold)
            ),
            reverse=True,
        )
        for place, (_, _, shard, position) in enumerate(ranked):
            copies[shard][position] = quota_share(place, len(ranked), rule)
    return copies


def quota_share(place: int, available: int, rule: SelectRule) -> int:
    """Deal `per_class` copies to the rows one at a time, best first, round after round."""
    if rule.per_class is None:
        return 1
    return min(math.ceil(max(rule.per_class - place, 0) / available), rule.max_copies)


def ordinal_of(position: int, gaps: bool = True) -> int:
    """The ordinal of a row; with `gaps`, as if every fourth sample were quarantined."""
    return position + position // 3 if gaps else position


def write_labels(folder: Path, shards: dict[str, list[Row]], gaps: bool = True, **columns: Sequence[Any]) -> None:
    """Label files with the columns of the contract that selection may read; `columns` replace some of every file.

    With `gaps` samples are missing, and the metadata say so; else they say that all are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard, rows in shards.items():
        ordinals = [ordinal_of(position, gaps) for position in range(len(rows))]
        table = {
            "ordinal": pa.array(ordinals, pa.int32()),
            "__key__": pa.array([f"{shard}-{ordinal}" for ordinal in ordinals], pa.string()),
            "label": pa.array([label for label, _ in rows], pa.int32()),
            "confidence": pa.array(np.array([confidence for _, confidence in rows], np.float32)),
            "image_hash": pa.array([1000 + ordinal for ordinal in ordinals], pa.uint64()),
        }
        metadata = {"quarantine": '[{"ordinal": 3}]' if gaps else "[]"}
        pq.write_table(pa.table({**table, **columns}, metadata=metadata), folder / f"{shard}.parquet", row_group_size=7)


def read_copies(folder: Path, shards: Sequence[str]) -> dict[str, list[int]]:
    tables = {shard: pq.read_table(folder / f"{shard}.parquet") for shard in shards}
    assert all(table.schema.field("copies").type == pa.uint16() for table in tables.values())
    return {shard: table["copies"].to_pylist() for shard, table in tables.items()}


def select_and_write(folder: Path, shards: Sequence[str], rule: SelectRule, **options: Any) -> dict[str, list[int]]:
    """The copies that select_shards and write_all_copies make of the label files in `folder`/labels."""
    selection = select_shards(LabelSource(str(folder / "labels"), rule), shards, **options)
    write_all_copies(selection, shards, str(folder / "out"))
    return read_copies(folder / "out", shards)


# Few distinct values make ties; neighbours in float32 share a bin; both ends of the range are there.
confidences = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-30, 0.25, 0.3, 0.7, 0.9, float(np.nextafter(np.float32(0.9), np.float32(1))), 1.0]),
    st.floats(0, 1, width=32),
)
files_of_rows = st.lists(st.lists(st.tuples(st.integers(0, 3), confidences), max_size=25), min_size=1, max_size=4)


def with_one_confidence(files: list[list[Row]], confidence: float) -> list[list[Row]]:
    return [[(label, confidence) for label, _ in rows] for rows in files]


shard_sets = st.one_of(
    files_of_rows,
    st.builds(with_one_confidence, files_of_rows, confidences),
    st.tuples(st.integers(0, 3), confidences).map(lambda row: [[row]]),
).map(lambda files: {f"shard-{index}": rows for index, rows in enumerate(files)})
rules = st.builds(
    SelectRule,
    num_classes=st.sampled_from([4, 5]),
    confidence_threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    per_class=st.one_of(st.none(), st.integers(1, 40)),
    max_copies=st.integers(1, 12),
)


@settings(max_examples=120, deadline=None)
@given(shards=shard_sets, rule=rules, max_candidates=st.sampled_from([0, 1, 5, 1000]), gaps=st.booleans())
def test_copies_are_those_of_sorting_everything(
    shards: dict[str, list[Row]], rule: SelectRule, max_candidates: int, gaps: bool
) -> None:
    few = (
        mock.patch("teacher.selection.label_reader._BATCH_ROWS", 5),
        mock.patch("teacher.selection.quota_search._COUNT_AFTER", 8),
    )
    with tempfile.TemporaryDirectory() as name, few[0], few[1]:
        write_labels(Path(name) / "labels", shards, gaps)
        copies = select_and_write(Path(name), list(shards), rule, max_candidates=max_candidates)
    assert copies == brute_force(shards, rule, gaps)


@settings(max_examples=40, deadline=None)
@given(shards=shard_sets, rule=rules, order=st.randoms(use_true_random=False), num_workers=st.sampled_from([2, 7]))
def test_any_worker_count_and_file_order_give_the_same_cut_offs(
    shards: dict[str, list[Row]], rule: SelectRule, order: Any, num_workers: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_labels(Path(name), shards)
        shuffled = list(shards)
        order.shuffle(shuffled)
        one = selection_json(select_shards(LabelSource(name, rule), list(shards)), {})
        many = selection_json(
            select_shards(LabelSource(name, rule), shuffled, Threads(num_workers), max_candidates=3), {}
        )
    assert one == many


@settings(max_examples=60, deadline=None)
@given(shards=shard_sets, rule=rules)
def test_quotas_are_met_exactly_or_the_shortfall_is_reported(shards: dict[str, list[Row]], rule: SelectRule) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_labels(Path(name), shards)
        content = selection_json(select_shards(LabelSource(name, rule), list(shards)), {})
    for entry in content["classes"]:
        quota = rule.per_class or entry["available"]
        most = entry["available"] * (rule.max_copies if rule.per_class else 1)
        assert entry["copies"] == min(quota, most)
        assert entry["kept"] == min(quota, entry["available"])
        assert entry["shortfall"] == quota - entry["copies"]
        assert entry["max_copies"] <= rule.max_copies
        assert (entry["class"] in content["empty_classes"]) == (entry["available"] == 0)


@pytest.mark.parametrize("max_candidates", [0, 100, 10**6])
def test_equal_confidences_fall_to_the_tie_hash_however_little_memory_there_is(
    tmp_path: Path, max_candidates: int
) -> None:
    shards = {f"s{index}": [(0, 0.5)] * 3000 for index in range(3)}
    rule = SelectRule(num_classes=1, confidence_threshold=0.3, per_class=4567, max_copies=3)
    write_labels(tmp_path / "labels", shards)
    seen: list[str] = []
    executor = Threads(1, lambda doing, *_: seen.append(doing))
    copies = select_and_write(tmp_path, list(shards), rule, max_candidates=max_candidates, executor=executor)
    assert copies == brute_force(shards, rule)
    assert sum(map(sum, copies.values())) == 4567
    assert ("count finely" in seen) == (max_candidates < 9000)


@pytest.mark.parametrize(
    ("available", "per_class", "max_copies", "base_copies", "num_extra"),
    [
        (0, 5, 9, 0, 0),
        (10, 3, 9, 0, 3),
        (3, 3, 9, 1, 0),
        (3, 7, 9, 2, 1),
        (3, 7, 3, 2, 1),
        (3, 7, 2, 2, 0),
        (3, 7, 1, 1, 0),
        (3, None, 9, 1, 0),
        (0, None, 9, 0, 0),
    ],
)
def test_copies_of_a_class_differ_by_at_most_one_and_stop_at_max_copies(
    available: int, per_class: int | None, max_copies: int, base_copies: int, num_extra: int
) -> None:
    base, extra = plan_copies(np.array([available]), SelectRule(1, 0.3, per_class, max_copies))
    assert (base.tolist(), extra.tolist()) == ([base_copies], [num_extra])


def test_one_image_is_repeated_up_to_max_copies_and_the_rest_is_a_shortfall(tmp_path: Path) -> None:
    rule = SelectRule(num_classes=2, confidence_threshold=0.3, per_class=10, max_copies=4)
    write_labels(tmp_path, {"s": [(1, 0.9)]})
    content = selection_json(select_shards(LabelSource(str(tmp_path), rule), ["s"]), {}, ["cat", "dog"])
    cat, dog = content["classes"]
    assert (cat["name"], cat["copies"], cat["shortfall"]) == ("cat", 0, 10)
    assert (dog["name"], dog["copies"], dog["shortfall"], dog["base_copies"]) == ("dog", 4, 6, 4)
    assert content["empty_classes"] == [0]


def test_a_confidence_equal_to_the_threshold_as_stored_is_kept(tmp_path: Path) -> None:
    assert float(np.float32(0.7)) < 0.7  # the pitfall: float32 rounds it down
    rule = SelectRule(num_classes=1, confidence_threshold=0.7, per_class=None, max_copies=1)
    write_labels(tmp_path / "labels", {"s": [(0, 0.7), (0, 0.69999), (0, 0.70001)]})
    assert select_and_write(tmp_path, ["s"], rule) == {"s": [1, 0, 1]}


def test_a_softmax_that_overshoots_one_is_the_most_confident(tmp_path: Path) -> None:
    rule = SelectRule(num_classes=1, confidence_threshold=0.3, per_class=1, max_copies=1)
    write_labels(tmp_path / "labels", {"s": [(0, 1.0), (0, 1.000001), (0, 1.0)]})
    assert select_and_write(tmp_path, ["s"], rule, max_candidates=0) == {"s": [0, 1, 0]}


def test_excluded_rows_get_no_copies_and_each_is_counted_under_one_reason(tmp_path: Path) -> None:
    labels, out = tmp_path / "labels", tmp_path / "out"
    write_labels(
        labels, {"a": [(0, 0.9), (0, 0.9), (0, 0.8), (0, 0.1), (0, 0.6)], "b": [(0, 0.95), (0, 0.2), (0, 0.7)]}
    )
    exclusions = Exclusions(  # positions 0 1 2 3 4 are ordinals 0 1 2 4 5
        held_out_samples={"a": [1, 2], "b": [1]},
        keys=ExcludedKeys({"b-1", "a-1", "b/b-0", "a/b-2", "elsewhere"}),
    )
    rule = SelectRule(num_classes=1, confidence_threshold=0.3, per_class=2, max_copies=1)
    selection = select_shards(LabelSource(str(labels), rule, exclusions), ["a", "b"])
    counts = write_all_copies(selection, ["a", "b"], str(out))
    assert read_copies(out, ["a", "b"]) == {"a": [1, 0, 0, 0, 0], "b": [0, 0, 1]}
    assert counts["a"] == ShardCounts(5, 1, 1, 2, 0, 1, 0, 1)
    assert counts["b"] == ShardCounts(3, 1, 1, 1, 1, 0, 0, 0)
    content = selection_json(selection, counts)
    assert content["reasons"] == {
        "held_out_duplicate": 3,
        "excluded_by_user": 1,
        "below_threshold": 1,
        "near_duplicate": 0,
        "over_quota": 1,
    }
    assert content["totals"] == {"rows": 8, "kept": 2, "copies": 2, "shortfall": 0}
    assert [shard["shard"] for shard in content["shards"]] == ["a", "b"]


@pytest.mark.parametrize("per_class", [99, None])
def test_selection_json_says_the_copies_of_every_row(tmp_path: Path, per_class: int | None) -> None:
    rng = np.random.default_rng(3)
    rows: list[Row] = [
        (int(label), float(c)) for label, c in zip(rng.integers(0, 7, 900), rng.random(900), strict=True)
    ]
    shards = {"x": rows[:400], "y": rows[400:]}
    write_labels(tmp_path / "labels", shards)
    rule = SelectRule(num_classes=8, confidence_threshold=0.3, per_class=per_class, max_copies=5)
    selection = select_shards(LabelSource(str(tmp_path / "labels"), rule), list(shards))
    counts = write_all_copies(selection, list(shards), str(tmp_path / "out"))
    content = json.loads(json.dumps(selection_json(selection, counts), allow_nan=False))
    expected = {
        shard: [copies_by_json(content, shard, position, row) for position, row in enumerate(rows)]
        for shard, rows in shards.items()
    }
    assert read_copies(tmp_path / "out", list(shards)) == expected
    assert sum(map(sum, expected.values())) > 0


def copies_by_json(content: dict[str, Any], shard: str, position: int, row: Row) -> int:
    """Compute a row's copies from selection.json alone."""
    label, confidence = row[0], np.float32(row[1])
    entry = content["classes"][label]
    if confidence < np.float32(content["rule"]["confidence_threshold"]):
        return 0
    limit = entry["one_more_from"]
    if limit is None:
        return int(entry["base_copies"])
    own = (confidence, python_tie_hash(shard, ordinal_of(position)))
    return int(entry["base_copies"]) + (own >= (np.float32(limit["confidence"]), int(limit["hash"], 16)))


def test_tie_hash_is_fixed_and_distinct_within_a_shard() -> None:
    hashes = tie_hash("shard-000000", np.arange(1000, dtype=np.int32))
    assert hashes.tolist() == [python_tie_hash("shard-000000", ordinal) for ordinal in range(1000)]
    assert len(set(hashes.tolist())) == 1000
    assert int(hashes[0]) == FIRST_HASH  # a change would select other images in existing runs


def test_an_empty_label_file_gets_an_empty_column(tmp_path: Path) -> None:
    rule = SelectRule(num_classes=2, confidence_threshold=0.3, per_class=5, max_copies=2)
    write_labels(tmp_path / "labels", {"empty": []})
    assert select_and_write(tmp_path, ["empty"], rule) == {"empty": []}
