"""Selecting from labels in an object store: one request for each file and reading, many at once, and the copies of a disk."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data import storage
from data.labels import label_files
from data.labels.label_files import LabeledShard, label_table, write_labels
from data.labels.top_k import top_k_of
from data.shards.split import Shard
from teacher.executors import Threads
from teacher.selection.copies import write_all_copies
from teacher.selection.hash_groups import find_hash_groups
from teacher.selection.label_reader import Exclusions, LabelSource
from teacher.selection.quota_search import select_shards
from teacher.selection.rule import SelectError, SelectRule
from tests.s3_server import FaultyS3

NAMES = [f"shard-{number}" for number in range(6)]
ROWS = 50
RULE = SelectRule(num_classes=5, confidence_threshold=0.3, per_class=30, max_copies=3)


def write(folder: str) -> dict[str, LabeledShard]:
    """Label files whose hashes occur twice; their entries in the manifest."""
    random, entries = np.random.default_rng(0), {}
    index = pa.table({"key": [f"{n}" for n in range(ROWS)], "offset": np.arange(ROWS), "size": np.arange(ROWS)})
    for name in NAMES:
        top_k = top_k_of(random.dirichlet(np.full(5, 0.5), ROWS).astype(np.float32), 3)
        table = label_table(index, np.arange(ROWS), top_k, np.arange(ROWS, dtype=np.uint64) // 2)
        shard = Shard(f"{name}.tar", 5, ROWS, "", name)
        entries[name] = write_labels(storage.join(folder, f"{name}.parquet"), shard, table, [], "me")
    return entries


def select(folder: str, out: str, entries: dict[str, LabeledShard], threads: Threads) -> list[bytes]:
    """The files of copies; with at most 8 images of a hash."""
    source = LabelSource(folder, RULE, labeled=entries)
    groups = find_hash_groups(source, NAMES, 8, threads=threads)
    source = LabelSource(folder, RULE, Exclusions(hash_groups=groups), entries)
    write_all_copies(select_shards(source, NAMES, threads), NAMES, out, threads)
    return [storage.read_bytes(storage.join(out, f"{name}.parquet")) for name in NAMES]


def test_each_file_is_one_request_in_each_reading_and_all_are_asked_for_at_once(
    s3: FaultyS3, folder: str, tmp_path: Path
) -> None:
    write(str(tmp_path))
    entries = write(folder)
    s3.requests.clear()
    together = s3.answer_together(".parquet", len(NAMES))
    found = select(folder, str(tmp_path / "out"), entries, Threads(1))
    assert not together.broken
    assert found == select(str(tmp_path), str(tmp_path / "local"), entries, Threads(1))
    readings = 5  # count hashes, collect hashes, count, collect, write
    path = folder.removeprefix("s3:/")
    assert sorted(s3.requests) == sorted(f"GET {path}/{name}.parquet" for name in NAMES * readings)


def test_several_threads_and_a_store_with_faults_select_the_same(s3: FaultyS3, folder: str, tmp_path: Path) -> None:
    entries = write(folder)
    expected = select(folder, str(tmp_path / "one"), entries, Threads(1))
    faults = [
        s3.add("503", "GET", "shard-1"),
        s3.add("cut", "GET", "shard-2", keep=100),
        s3.add("short", "GET", "shard-3", keep=9),
    ]
    assert select(folder, str(tmp_path / "many"), entries, Threads(3)) == expected
    assert [fault.done for fault in faults] == [1, 1, 1]


def test_a_large_file_is_read_by_the_columns_that_are_needed(
    s3: FaultyS3, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = write(folder)
    expected = select(folder, str(tmp_path / "whole"), entries, Threads(1))
    monkeypatch.setattr(label_files, "_MAX_FETCHED", 100)
    assert select(folder, str(tmp_path / "columns"), entries, Threads(1)) == expected


@pytest.mark.parametrize("content", [b"short", bytes(100_000)], ids=["shorter", "longer"])
def test_a_file_that_was_replaced_or_removed_is_told_as_on_a_disk(s3: FaultyS3, folder: str, content: bytes) -> None:
    entries = write(folder)
    storage.write_bytes(f"{folder}/{NAMES[2]}.parquet", content)
    with pytest.raises(SelectError, match=rf"{NAMES[2]}\.parquet: damaged or cut short"):
        select_shards(LabelSource(folder, RULE, labeled=entries), NAMES)
    storage.remove(f"{folder}/{NAMES[2]}.parquet")
    with pytest.raises(SelectError, match=rf"{NAMES[2]}\.parquet: no such label file"):
        select_shards(LabelSource(folder, RULE, labeled=entries), NAMES)
