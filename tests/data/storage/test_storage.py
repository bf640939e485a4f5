"""Paths, patterns, and files that are whole or not there."""

import ctypes
import errno
import os
import resource
import threading
from collections.abc import Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
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


# patterns: what is there as it is written wins, and a listing that fails is not an empty one


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


# web servers: a query is part of the URL


class _Web(BaseHTTPRequestHandler):
    """One file at /d/x.tar, with any query; `status` for everything else. `broken`: so many answers end in the middle."""

    status, broken = 404, 0

    def do_GET(self) -> None:
        if not self.path.startswith("/d/x.tar"):
            self.send_error(_Web.status)
            return
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", "bytes 0-3/4")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        _Web.broken -= 1  # before the client has its answer and the test looks
        self.wfile.write(b"4\r\nab" if _Web.broken >= 0 else b"4\r\nabcd\r\n0\r\n\r\n")

    do_HEAD = do_GET  # noqa: N815 (the base class's name)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(_Web, "status", 404)
    monkeypatch.setattr(_Web, "broken", 0)
    monkeypatch.setattr(_Web, "protocol_version", "HTTP/1.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("query", ["?download=true", "?X-Amz-Signature=a/b&X=[1]*", "?sv=1&sig=a%2Fb%3D&x=?"])
def test_a_query_is_part_of_the_url_and_not_of_the_name(query: str) -> None:
    url = f"https://host/d/x.tar{query}"
    assert storage.expand(url) == [url]
    assert storage.base_name(url) == "x.tar"
    assert storage.parent(url) == "https://host/d"
    assert storage.expand(f"https://host/d/x-{{0..1}}.tar{query}") == [f"https://host/d/x-{n}.tar{query}" for n in "01"]
    with pytest.raises(StorageError, match="one file"):
        storage.expand(f"https://host/d/*.tar{query}")


def test_elsewhere_a_question_mark_is_part_of_the_name() -> None:
    assert storage.base_name("s3://bucket/is it?.tar") == "is it?.tar"
    assert storage.parent("s3://bucket/a?b/x.tar") == "s3://bucket/a?b"
    assert storage.parent("x.tar") == "."


def test_a_chunked_answer_that_breaks_off_is_asked_for_again(web: str) -> None:
    _Web.broken = 2
    assert storage.read_bytes(f"{web}/d/x.tar?download=true") == b"abcd"
    assert _Web.broken < 0
    _Web.broken = 1000
    with pytest.raises(StorageError, match=r"x\.tar: .* failed: IncompleteRead.*tried 6 times"):
        storage.read_bytes(f"{web}/d/x.tar")


def test_a_web_folder_that_is_refused_is_not_taken_for_an_empty_one(web: str) -> None:
    with pytest.raises(storage.MissingError, match="matches no file"):
        storage.expand(f"{web}/d/*.tar")
    _Web.status = 403
    with pytest.raises(StorageError, match=r"list refused: 403"):
        storage.expand(f"{web}/d/*.tar")
    _Web.status = 503
    with pytest.raises(StorageError, match=r"list failed: 503.*tried 6 times"):
        storage.expand(f"{web}/d/*.tar")


@pytest.mark.parametrize("name", ["a b.tar", "läufe.tar"])
def test_a_url_that_cannot_be_sent_is_named(web: str, name: str) -> None:
    with pytest.raises(StorageError, match=rf"{name}: not a URL .*%20"):
        storage.read_bytes(f"{web}/{name}")
