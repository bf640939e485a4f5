"""Footers alone tell what label files are: one small request each, nothing that is damaged or another's believed."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import storage
from data.errors import DataError
from data.labels.label_files import LabeledShard, Quarantined, label_table, write_labels
from data.labels.label_footers import describe_by_footers, read_all_quarantined
from data.labels.top_k import top_k_of
from data.shards.split import Shard
from tests.data.labels.test_flipped_bits import flips
from tests.s3_server import FaultyS3

LONG_LEDGER = 200  # quarantined rows whose reasons make a footer of more than one request


def write(folder: str, names: Sequence[str], quarantined: int = 0) -> list[LabeledShard]:
    """Label files of 20 rows; the last has `quarantined` samples without a label."""
    index = pa.table({"key": [f"{n}" for n in range(20)], "offset": np.arange(20) * 512, "size": np.arange(20)})
    top_k = top_k_of(np.random.default_rng(0).dirichlet(np.ones(5), 20).astype(np.float32), 3)
    table = label_table(index, np.arange(20), top_k, np.zeros(20, np.uint64))
    ledgers = {
        name: [Quarantined(name, 20 + n, f"k{n}", n, "r" * 100) for n in range(quarantined)] for name in names[-1:]
    }
    return [
        write_labels(storage.join(folder, f"{name}.parquet"), Shard(f"{name}.tar", 5, 20, "", name), table, ledgers.get(name, []), "me")
        for name in names
    ]  # fmt: skip


def without_digests(entries: Sequence[LabeledShard]) -> list[LabeledShard]:
    return [replace(entry, sha256="") for entry in entries]


@pytest.mark.parametrize("quarantined", [0, LONG_LEDGER])
def test_footers_say_what_whole_files_say(tmp_path: Path, quarantined: int) -> None:
    entries = write(str(tmp_path), ["a", "b"], quarantined)
    assert list(describe_by_footers(str(tmp_path), storage.list_sizes(str(tmp_path)))) == without_digests(entries)


@pytest.mark.parametrize(("quarantined", "requests"), [(0, 1), (LONG_LEDGER, 2)])
def test_a_footer_in_a_store_is_one_request_and_a_long_one_two(
    s3: FaultyS3, folder: str, quarantined: int, requests: int
) -> None:
    entries, name = write(folder, ["a"], quarantined), f"{folder.removeprefix('s3:/')}/a.parquet"
    sizes = storage.list_sizes(folder)
    s3.requests.clear()
    assert list(describe_by_footers(folder, sizes)) == without_digests(entries)
    assert s3.requests == [f"GET {name}"] * requests


def test_a_store_that_answers_503_or_cuts_an_answer_short_is_asked_again(s3: FaultyS3, folder: str) -> None:
    entries, sizes = write(folder, ["a", "b"]), storage.list_sizes(folder)
    s3.add("503", "GET", "a.parquet")
    s3.add("short", "GET", "b.parquet", keep=10)
    assert list(describe_by_footers(folder, sizes)) == without_digests(entries)


def test_a_file_that_is_gone_damaged_or_of_another_program_is_none(tmp_path: Path) -> None:
    entries = write(str(tmp_path), ["a", "b", "c", "d"])
    sizes = storage.list_sizes(str(tmp_path))
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-100])
    pq.write_table(pa.table({"label": [1]}), tmp_path / "c.parquet")
    sizes["c.parquet"] = (tmp_path / "c.parquet").stat().st_size
    found = list(describe_by_footers(str(tmp_path), sizes | {"b.parquet": sizes["b.parquet"] - 100}))
    assert found == [None, None, None, *without_digests(entries[3:])]


def test_a_file_that_became_shorter_since_the_listing_is_an_error(tmp_path: Path) -> None:
    write(str(tmp_path), ["a"])
    sizes = storage.list_sizes(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(storage.StorageError, match=r"a\.parquet: .*become shorter"):
        list(describe_by_footers(str(tmp_path), sizes))


def test_no_flipped_bit_of_a_footer_is_believed(tmp_path: Path) -> None:
    entry, path = write(str(tmp_path), ["a"])[0], tmp_path / "a.parquet"
    for content in flips(path.read_bytes(), 2000, 1):
        path.write_bytes(content)
        found = list(describe_by_footers(str(tmp_path), {"a.parquet": len(content)}))
        assert found in ([None], without_digests([entry])), "damage in the pages is found by their readers"


def test_quarantined_samples_are_read_from_footers(s3: FaultyS3, folder: str) -> None:
    entries = write(folder, ["a", "b", "c"], quarantined=3)
    s3.requests.clear()
    found = read_all_quarantined(folder, entries).to_pylist()
    assert [(row["shard"], row["ordinal"]) for row in found] == [("c", 20), ("c", 21), ("c", 22)]
    assert len(s3.requests) == 1, "the others have none, by their entries"


def test_the_quarantined_samples_of_another_teacher_or_shard_are_refused(tmp_path: Path) -> None:
    entry = write(str(tmp_path), ["a"], quarantined=1)[0]
    for other in (replace(entry, made_by="you"), replace(entry, source_bytes=6), replace(entry, bytes=entry.bytes - 1)):
        with pytest.raises(DataError, match=r"a\.parquet: .*stage=label verify=true"):
            read_all_quarantined(str(tmp_path), [other])


def test_a_damaged_record_of_quarantined_samples_in_a_file_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    entry, path = write(str(tmp_path), ["a"], quarantined=1)[0], tmp_path / "a.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"quarantine": b"[{]"}), path)
    content = path.read_bytes()
    old = replace(entry, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError, match=r"a\.parquet: .*record of quarantined samples.*stage=label verify=true"):
        read_all_quarantined(str(tmp_path), [old])
    assert list(describe_by_footers(str(tmp_path), {"a.parquet": old.bytes})) == [None]


def test_a_file_of_an_earlier_version_is_compared_with_its_digest(tmp_path: Path) -> None:
    """It has no checksum over its footer."""
    entry, path = write(str(tmp_path), ["a"], quarantined=1)[0], tmp_path / "a.parquet"
    pq.write_table(pq.read_table(path), path)
    old = replace(entry, bytes=path.stat().st_size)
    with pytest.raises(DataError, match="another SHA-256"):
        read_all_quarantined(str(tmp_path), [old])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_all_quarantined(str(tmp_path), [replace(old, sha256=digest)]).num_rows == 1
    assert list(describe_by_footers(str(tmp_path), {"a.parquet": old.bytes})) == [replace(old, sha256="")]
