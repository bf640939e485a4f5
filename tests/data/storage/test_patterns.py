"""Patterns: what is there as it is written wins, and a listing that fails is not an empty one."""

import errno
import os
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import storage
from data.storage import StorageError, retry


def test_braces_expand_in_order_with_leading_zeros() -> None:
    assert storage.expand("a/x-{008..011}.tar") == ["a/x-008.tar", "a/x-009.tar", "a/x-010.tar", "a/x-011.tar"]
    assert storage.expand("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]


def test_globs_expand_sorted_and_a_shard_named_twice_counts_once(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert storage.expand([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"]) == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]


def test_a_pattern_without_a_match_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing-\*\.tar.*matches no file"):
        storage.expand(f"{tmp_path}/nothing-*.tar")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x-{3..1}.tar", ["x-3.tar", "x-2.tar", "x-1.tar"]),
        ("x-{10..8}.tar", ["x-10.tar", "x-9.tar", "x-8.tar"]),
        ("x-{010..008}.tar", ["x-010.tar", "x-009.tar", "x-008.tar"]),
        ("x-{8..10}.tar", ["x-8.tar", "x-9.tar", "x-10.tar"]),
        ("x-{7..7}.tar", ["x-7.tar"]),
    ],
)
def test_a_brace_range_counts_upwards_and_downwards(pattern: str, expected: list[str]) -> None:
    assert storage.expand(pattern) == expected


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 4))
def test_a_range_downwards_is_the_range_upwards_turned_round(first: int, last: int, width: int) -> None:
    low, high = (str(number).zfill(width) for number in sorted((first, last)))
    up, down = storage.expand(f"x-{{{low}..{high}}}.tar"), storage.expand(f"x-{{{high}..{low}}}.tar")
    assert down == up[::-1]
    assert len(up) == abs(first - last) + 1


@pytest.mark.parametrize(
    "signs", ["run [1]", "a*b", "is it?", "{new}", "{a,b}", "x{1..3}y", "[a", "100% #1", "läufe ü"]
)
def test_a_path_that_is_there_as_it_is_written_wins_over_what_its_signs_match(tmp_path: Path, signs: str) -> None:
    for folder in (signs, "run 1", "aab", "is itx", "new", "a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x-0.tar", "x-1.tar"):
            (tmp_path / folder / name).touch()
    (tmp_path / signs / f"{signs}.tar").touch()
    inside = f"{tmp_path}/{signs}"
    assert storage.expand(f"{inside}/{signs}.tar") == [f"{inside}/{signs}.tar"]
    assert storage.expand(f"{inside}/x-*.tar") == [f"{inside}/x-0.tar", f"{inside}/x-1.tar"]
    assert storage.expand(f"{inside}/x-{{0..1}}.tar") == [f"{inside}/x-0.tar", f"{inside}/x-1.tar"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text("ab[]*?{},.!- ä%#1", min_size=1, max_size=8).filter(lambda name: name.strip(".") != ""))
def test_any_file_can_be_named_as_it_is(tmp_path: Path, name: str) -> None:
    url = f"{tmp_path}/{name}.tar"
    Path(url).touch()
    assert storage.expand(url) == [url]


def test_globs_match_folders_hidden_files_and_depths_as_a_shell_does(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a/1.tar", "a/.2.tar", "b/1.tar", "b/deep/3.tar", ".c/1.tar", "lost+found/1.tar", "top.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert storage.expand("*.tar") == ["top.tar"]
    assert storage.expand("*/1.tar") == ["a/1.tar", "b/1.tar"]
    assert storage.expand("*/?.tar") == ["a/1.tar", "b/1.tar"]
    assert storage.expand("a/.*.tar") == ["a/.2.tar"]
    assert storage.expand("**/*.tar") == ["a/1.tar", "b/1.tar", "b/deep/3.tar", "top.tar"]
    assert storage.expand("b/**") == ["b/1.tar", "b/deep/3.tar"]
    assert storage.expand("lost+found/*.tar") == ["lost+found/1.tar"]
    assert storage.expand(f"file://{tmp_path}/[ab]/1.tar") == [f"{tmp_path}/a/1.tar", f"{tmp_path}/b/1.tar"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three disks answer: their shards are not all shards."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.tar").touch()
    scan = os.scandir

    def fail(folder: str) -> Any:
        if str(folder).endswith("/b"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), folder)
        return scan(folder)

    monkeypatch.setattr("data.storage.os.scandir", fail)
    for pattern in (f"{tmp_path}/*/*.tar", f"{tmp_path}/**/*.tar", f"{tmp_path}/*/x.tar"):
        with pytest.raises(OSError, match=f"Input/output error.*{tmp_path}/b"):
            storage.expand(pattern)


class _Flaky(MemoryFileSystem):
    """A store without a client of its own here; its listings of one folder fail."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fails = 0  # so many times

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        if "/b" in path and _Flaky.fails > 0:
            _Flaky.fails -= 1
            raise ConnectionError("no answer")
        return super().ls(path, detail, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("flaky", _Flaky, clobber=True)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    _Flaky.store.clear()
    _Flaky.fails = 0
    for name in ("a/1.tar", "b/2.tar", "b/deep/3.tar"):
        storage.write_bytes(f"flaky://root/{name}", b"x")
    return "flaky://root"


@pytest.mark.parametrize("pattern", ["*/*.tar", "**/*.tar"])
def test_on_any_store_a_listing_that_fails_is_not_an_empty_one(flaky: str, pattern: str) -> None:
    everything = storage.expand(f"{flaky}/{pattern}")
    _Flaky.fails = 1
    assert storage.expand(f"{flaky}/{pattern}") == everything
    _Flaky.fails = 1000
    with pytest.raises(StorageError, match="list failed: ConnectionError: no answer") as caught:
        storage.expand(f"{flaky}/{pattern}")
    assert not isinstance(caught.value, storage.MissingError)


def test_on_any_store_nothing_is_lost_by_moving_a_folder_that_cannot_be_listed(flaky: str) -> None:
    """fsspec's own listing leaves the folder out; then only the rest is copied, and all is deleted."""
    _Flaky.fails = 1000
    with pytest.raises(StorageError, match="list failed"):
        storage.move(flaky, "flaky://moved")
    _Flaky.fails = 0
    assert storage.expand(f"{flaky}/**/*.tar") == [f"{flaky}/{name}.tar" for name in ("a/1", "b/2", "b/deep/3")]
    storage.move(flaky, "flaky://moved")
    assert storage.expand("flaky://moved/**/*.tar") == [
        f"flaky://moved/{name}.tar" for name in ("a/1", "b/2", "b/deep/3")
    ]
