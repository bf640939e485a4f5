"""Keys that the user excludes are seen by nobody, and a run says which list it was made with."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.labels import exclusions, key_set
from data.labels.exclusions import ExcludedKeys, exclude_inputs, read_keys
from data.labels.key_set import KeySet
from data.shards.split import Split, open_split
from pipeline.core.config import load_config
from pipeline.core.schema import TeacherConfig
from pipeline.inputs.batches import TrainBatches
from pipeline.inputs.streams import labeled_stream
from student.train import fingerprint as student_fingerprint
from teacher.train import fingerprint as teacher_fingerprint
from tests.conftest import WriteDigits

RECORD = {"digest": "ab" * 8}
KEYS = ["a", "b", "a/b", "/a", "s/a", "é", ""]


@pytest.fixture
def labeled(tmp_path: Path, write_digits: WriteDigits) -> Split:
    write_digits(tmp_path / "labeled", 0, 30, per_shard=12)
    return open_split(f"{tmp_path}/labeled/*.tar", f"{tmp_path}/index")


def write_list(folder: Path, *keys: str) -> str:
    (folder / "exclude.txt").write_text("".join(f"{key}\n" for key in keys))
    return f"{folder}/exclude.txt"


def seen_keys(split: Split, exclude: ExcludedKeys) -> list[str]:
    """Of two epochs."""
    stream = labeled_stream(split, 2, exclude)
    config = TeacherConfig.model_validate({"image_size": 8, "augment": {"crop": "pad_crop", "num_ops": 0}})
    batches = TrainBatches((stream,), config, 10, seed=0)
    keys = [key for step in range(stream.num_images) for key in batches.keys(step)]
    batches.close()
    return sorted(key.rpartition("'")[0].rpartition("'")[2] for key in keys)


def test_excluded_labeled_images_are_never_seen_and_all_others_once_an_epoch(labeled: Split) -> None:
    excluded = ExcludedKeys({"00003", "00013", "elsewhere"})
    assert labeled_stream(labeled, 2, excluded).num_images == 28
    expected = [f"{number:05d}" for number in range(30) if number not in (3, 13) for _ in range(2)]
    assert seen_keys(labeled, excluded) == expected


def test_a_line_with_a_shards_name_is_of_that_shard_alone(labeled: Split) -> None:
    lines = ExcludedKeys({"labeled-000001/00013", "labeled-000000/00014", "unlabeled-000001/00015"})
    assert "00013" not in seen_keys(labeled, lines)
    assert {"00014", "00015"} <= set(seen_keys(labeled, lines))


def test_a_list_of_all_labeled_images_is_an_error(labeled: Split) -> None:
    with pytest.raises(DataError, match=r"data\.exclude has the keys of all labeled images"):
        labeled_stream(labeled, 2, ExcludedKeys(f"{number:05d}" for number in range(30)))


def test_a_list_is_in_the_fingerprints_of_teacher_and_student_and_only_when_it_is_given(
    labeled: Split, tmp_path: Path
) -> None:
    def inputs(*words: str) -> list[set[str]]:
        config = load_config(None, list(words))
        teacher = teacher_fingerprint(config, labeled, None)
        student = student_fingerprint(config, labeled, None, RECORD, RECORD)
        return [set(teacher.inputs), set(student.inputs)]

    without = [{"labeled", "validation"}, {"labeled", "validation", "labels", "selection"}]
    assert inputs() == without
    assert inputs(f"data.exclude={write_list(tmp_path, '00003')}") == [names | {"exclude"} for names in without]


def test_the_digest_is_of_the_keys_as_a_set(tmp_path: Path) -> None:
    first = exclude_inputs(write_list(tmp_path, "a", "b", "", "a"))
    assert first == exclude_inputs(write_list(tmp_path, "b", "a"))
    assert first != exclude_inputs(write_list(tmp_path, "b"))
    assert (read_keys(None).lines(), exclude_inputs(None)) == ([], {})


def test_a_list_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nowhere.txt", "binary", ""):
        with pytest.raises(DataError, match=rf"data\.exclude={tmp_path}/{name}: expected a text file of keys"):
            read_keys(f"{tmp_path}/{name}")


def test_the_fields_old_place_is_an_error_that_names_the_new_one_unless_it_was_empty() -> None:
    with pytest.raises(ValueError, match=r"select\.exclude: was renamed; give data\.exclude=keys\.txt"):
        load_config(None, ["select.exclude=keys.txt"])
    assert load_config(None, ["select.exclude=null"]) == load_config(None, [])


def test_a_byte_order_mark_and_blanks_at_the_ends_are_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufefffirst \r\nsecond\t\r\n".encode())
    assert read_keys(f"{tmp_path}/list.txt").lines() == ["first", "second"]


@given(
    st.sets(st.builds(str.__add__, st.sampled_from(["", "s/", "s-1/", "s0/", "t/", "/"]), st.sampled_from(KEYS))),
    st.lists(st.sampled_from(KEYS)),
)
def test_a_key_is_excluded_by_a_line_that_is_the_key_or_shard_and_key(lines: set[str], keys: list[str]) -> None:
    for shard in ("s", "s-1", "u"):
        expected = [key in lines or f"{shard}/{key}" in lines for key in keys]
        for excluded in (ExcludedKeys(lines), pickle.loads(pickle.dumps(ExcludedKeys(lines)))):
            assert excluded.mask(shard, pa.array(keys, pa.string())).tolist() == expected


def test_a_shard_costs_by_its_own_lines_however_long_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a list of 100,000 lines, each is looked at once when the list is read, and once in its shard."""
    passes, looked_up = 0, 0

    def lines() -> Iterator[str]:
        nonlocal passes
        passes += 1
        yield from (f"images-{number // 100:06d}/{number % 100:08d}" for number in range(100_000))

    original = pc.is_in

    def counted(values: pa.Array, value_set: pa.Array) -> pa.Array:
        nonlocal looked_up
        looked_up += len(value_set)
        return original(values, value_set=value_set)

    monkeypatch.setattr(exclusions.pc, "is_in", counted)
    monkeypatch.setattr(ExcludedKeys, "lines", lambda _: pytest.fail("the whole list was read for a shard"))
    excluded, keys = ExcludedKeys(lines()), pa.array([f"{number:08d}" for number in range(200)])
    found = [excluded.mask(f"images-{number:06d}", keys).sum() for number in range(1000)]
    assert (sum(found), set(found)) == (100_000, {100})
    assert (passes, looked_up) == (1, 100_000)


def test_of_lines_without_a_slash_few_are_looked_up_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up each of 130 million keys in Python takes minutes."""
    lines = [f"{number:012d}" for number in range(0, 1_000_000, 10)]
    excluded, looked_up = ExcludedKeys(lines), 0
    excluded.mask("s", pa.array(["a"]))  # makes the tables

    def counted(array: pa.StringArray) -> list[str]:
        nonlocal looked_up
        looked_up += len(array)
        return list(array.to_pylist())

    monkeypatch.setattr(key_set, "_as_texts", counted)
    keys = pa.array([f"{number:012d}" for number in range(500_001, 510_001)])
    assert np.flatnonzero(excluded.mask("s", keys)).tolist() == list(range(9, 10_000, 10))
    assert looked_up < 2_500


@given(st.sets(st.text("ab/é\0", max_size=90)), st.lists(st.text("ab/é\0", max_size=90)), st.integers(0, 5))
def test_a_set_has_the_keys_that_it_was_made_of(members: set[str], others: list[str], start: int) -> None:
    keys = [*members, *others][start:]
    found = KeySet(pa.array(sorted(members), pa.string())).contains(pa.array([*members, *others], pa.string())[start:])
    assert found.tolist() == [key in members for key in keys]


def test_a_list_that_is_read_again_is_grouped_again_only_if_it_has_changed(tmp_path: Path) -> None:
    url = write_list(tmp_path, "a", "s/b")
    first = read_keys(url)
    assert read_keys(url) is first
    write_list(tmp_path, "a", "s/c")
    assert read_keys(url).lines() == ["a", "s/c"]
