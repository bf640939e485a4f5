"""What packing removes is its own: shards that a marker lists. All else makes it refuse."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scratch import fresh_folder, remove_folder
from data import storage
from data.errors import DataError
from data.settings import UsageError
from data.shards.write import MARKER_NAME, Fields, write_shards


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def samples(count: int, killed_at: int | None = None) -> Iterator[tuple[str, Fields]]:
    for number in range(count):
        if number == killed_at:
            raise KeyboardInterrupt
        yield f"{number:03d}", {"png": b"image"}


def begin(folder: Path, killed_at: int, per_shard: int = 2) -> None:
    """A packing of ten samples that is stopped."""
    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(10, killed_at), str(folder), "unlabeled", per_shard)


def test_shards_that_are_there_without_a_marker_make_packing_refuse_and_stay(tmp_path: Path) -> None:
    (tmp_path / "unlabeled-000000.tar").write_bytes(b"a month of crawling")
    with pytest.raises(DataError, match=r"holds unlabeled-000000\.tar, and no packing began there"):
        write_shards(samples(3), str(tmp_path), "unlabeled", 2)
    assert snapshot(tmp_path) == {"unlabeled-000000.tar": b"a month of crawling"}


def test_a_packing_that_was_killed_is_begun_again_and_its_shards_are_replaced(tmp_path: Path) -> None:
    begin(tmp_path / "killed", killed_at=7)
    (tmp_path / "killed/.tmp-0123abcd-unlabeled-000003.tar").write_bytes(b"half")
    write_shards(samples(4), str(tmp_path / "killed"), "unlabeled", 2)
    write_shards(samples(4), str(tmp_path / "whole"), "unlabeled", 2)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_a_foreign_shard_among_those_of_a_killed_packing_stays(tmp_path: Path) -> None:
    begin(tmp_path, killed_at=3)
    (tmp_path / "unlabeled-000099.tar").write_bytes(b"foreign")
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"unlabeled-000099\.tar: not of the packing that began there"):
        write_shards(samples(4), str(tmp_path), "unlabeled", 2)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("marker", ["", "null", "[]", '{"prefix": "labeled", "shards": 3}', '{"prefix": "unlabeled"}'])
def test_a_marker_of_something_else_removes_nothing(tmp_path: Path, marker: str) -> None:
    (tmp_path / MARKER_NAME).write_text(marker)
    (tmp_path / "unlabeled-000000.tar").write_bytes(b"foreign")
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match="choose another out="):
        write_shards(samples(3), str(tmp_path), "unlabeled", 2)
    assert snapshot(tmp_path) == before


@settings(max_examples=30, deadline=None)
@given(
    foreign=st.dictionaries(
        st.sampled_from([
            "unlabeled-000000.tar", "unlabeled-000007.tar", "unlabeled-x.tar", "labeled-000000.tar", "notes.txt", "sub/a.tar",
            "index/unlabeled-000000.parquet", ".tmp-mine", ".tmp-folder/file", "manifest.json.bak",
        ]),
        st.binary(max_size=8),
        max_size=4,
    ),
    killed_at=st.one_of(st.none(), st.integers(0, 9)),
)  # fmt: skip
def test_whatever_lies_in_the_folder_only_what_packing_wrote_is_removed(
    tmp_path_factory: pytest.TempPathFactory, foreign: dict[str, bytes], killed_at: int | None
) -> None:
    folder = tmp_path_factory.mktemp("packing")
    if killed_at is not None:
        begin(folder, killed_at)
    foreign = {name: content for name, content in foreign.items() if not (folder / name).exists()}
    for name, content in foreign.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    listed = int(json.loads((folder / MARKER_NAME).read_text())["shards"]) if (folder / MARKER_NAME).exists() else 0
    mine = {f"index/unlabeled-{number:06d}.parquet" for number in range(listed)}
    mine |= {f"unlabeled-{number:06d}.tar" for number in range(listed)}
    try:
        write_shards(samples(10), str(folder), "unlabeled", 2)
    except DataError:
        assert foreign, "a folder of its own is never refused"
    after = snapshot(folder)
    for name, content in foreign.items():
        if name not in mine:
            assert after[name] == content


def test_temporary_names_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in (".tmp-mine", ".tmp-0123abcd-file.tar", ".tmp-0123abcdef", ".tmp-folder/.tmp-89abcdef-x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".tmp-01234567-folder").mkdir()
    storage.remove_temporary(str(tmp_path))
    assert sorted(snapshot(tmp_path)) == [".tmp-0123abcdef", ".tmp-mine"]
    assert (tmp_path / ".tmp-01234567-folder").is_dir()


def test_a_benchmark_empties_only_what_a_benchmark_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="no benchmark made"):
        fresh_folder(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").exists()
    (fresh_folder(tmp_path / "out") / "scratch").touch()
    assert list(fresh_folder(tmp_path / "out").iterdir()) == []
    remove_folder(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
