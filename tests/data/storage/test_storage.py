"""Paths, and files that are whole or not there."""

import ctypes
import errno
import os
import resource
import threading
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import pytest

from data import storage
from data.storage import StorageError


def test_pipe_urls_are_refused() -> None:
    with pytest.raises(StorageError, match="shell"):
        storage.expand("pipe:cat x.tar")
    with pytest.raises(StorageError, match="shell"):
        storage.read_bytes("pipe:cat x.tar")


@pytest.mark.parametrize("base", ["{tmp}", "memory://test-storage"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, base: str) -> None:
    url = storage.join(base.format(tmp=tmp_path), "folder", "file.bin")
    storage.write_bytes(url, b"old")

    def fail() -> None:
        with storage.writing(url) as file:
            file.write(b"half")
            raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        fail()
    assert storage.read_bytes(url) == b"old"
    assert storage.list_names(url.rpartition("/")[0]) == ["file.bin"]


@pytest.mark.parametrize("base", ["{tmp}", "memory://test-verbs"])
def test_reading_listing_moving_and_removing_work_alike_on_disk_and_elsewhere(tmp_path: Path, base: str) -> None:
    root = storage.join(base.format(tmp=tmp_path), "root")
    storage.write_bytes(storage.join(root, "a", "x.bin"), b"0123456789")
    assert storage.read_bytes(storage.join(root, "a", "x.bin"), 3, 4) == b"3456"
    assert storage.size(storage.join(root, "a", "x.bin")) == 10
    assert storage.list_names(storage.join(root, "a")) == ["x.bin"]
    storage.move(storage.join(root, "a"), storage.join(root, "b"))
    assert not storage.exists(storage.join(root, "a", "x.bin"))
    assert storage.read_text(storage.join(root, "b", "x.bin")) == "0123456789"
    storage.remove(storage.join(root, "b"))
    assert storage.list_names(storage.join(root, "b")) == []


def test_what_a_killed_writer_left_is_not_listed_and_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123abcd-file.bin").touch()
    (tmp_path / "file.bin").touch()
    assert storage.list_names(str(tmp_path)) == ["file.bin"]
    storage.remove_temporary(str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.storage.os.fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*/file\.bin") as caught:
        storage.write_bytes(str(tmp_path / "file.bin"), b"content")
    assert storage.is_out_of_room(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["{tmp}", "memory://test-together"])
def test_files_written_together_are_all_there_in_the_end(tmp_path: Path, base: str) -> None:
    root = storage.join(base.format(tmp=tmp_path), "root")
    with storage.writing_together() as writing:
        for name in ("a", "b"):
            with writing(storage.join(root, name, "file.bin")) as file:
                file.write(name.encode())
    assert [storage.read_text(storage.join(root, name, "file.bin")) for name in ("a", "b")] == ["a", "b"]
    assert storage.list_names(storage.join(root, "a")) == ["file.bin"]


def test_no_file_written_together_has_its_name_before_all_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(paths: Collection[str]) -> None:
        assert sorted(Path(path).read_bytes() for path in paths) == [b"a", b"b"]
        assert storage.list_names(str(tmp_path)) == []
        synced.append(True)

    synced: list[bool] = []
    monkeypatch.setattr("data.storage.local._sync_files", check)
    with storage.writing_together() as writing:
        for name in ("a", "b"):
            with writing(str(tmp_path / name)) as file:
                file.write(name.encode())
    assert synced
    assert storage.list_names(str(tmp_path)) == ["a", "b"]


def test_of_files_written_together_none_remains_when_one_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail() -> None:
        with storage.writing_together() as writing:
            with writing(str(tmp_path / "a")) as file:
                file.write(b"new")
            with writing(str(tmp_path / "b")) as file:
                raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        fail()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize("has_syncfs", [True, False])
def test_a_disk_that_cannot_keep_files_written_together_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_syncfs: bool
) -> None:
    def fail(descriptor: int) -> int:
        if not has_syncfs:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        ctypes.set_errno(errno.EIO)
        return -1

    library = SimpleNamespace(syncfs=fail) if has_syncfs else SimpleNamespace()
    monkeypatch.setattr("data.storage.local.ctypes.CDLL", lambda *_, **__: library)
    monkeypatch.setattr("data.storage.os.fsync", fail)

    def write() -> None:
        with storage.writing_together() as writing, writing(str(tmp_path / "a")) as file:
            file.write(b"new")

    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"v\xff")
    with pytest.raises(UnicodeDecodeError, match=rf"invalid start byte: {tmp_path}/latest"):
        storage.read_text(f"{tmp_path}/latest")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file whose first bytes cannot be read")
def test_a_read_that_fails_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self/mem")
    url = f"{tmp_path}/link"
    with pytest.raises(OSError, match=rf"Input/output error: '{url}'"):
        storage.read_bytes(url)
    with storage.open_read(url) as file, pytest.raises(OSError, match=rf"Input/output error: '{url}'"):
        file.read(10)


def test_a_write_that_is_too_large_names_the_file_and_leaves_none(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/large\.bin'"):
            storage.write_bytes(f"{tmp_path}/large.bin", bytes(2 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_files_that_others_rename_while_a_folder_is_listed_do_no_harm(tmp_path: Path) -> None:
    """A worker that outlives its driver commits label files while the next driver lists them."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            storage.write_bytes(str(tmp_path / "a.parquet"), b"some")

    storage.write_bytes(str(tmp_path / "a.parquet"), b"some")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2000):
            assert storage.list_sizes(str(tmp_path)) == {"a.parquet": 4}
    finally:
        stop.set()
        writer.join()
