"""Files on web servers: a query is part of the URL, and what fails on the way is asked for again or told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from data import storage
from data.storage import ChangedError, StorageError, retry
from data.storage.http import HttpFile


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
        self.close_connection = _Web.broken >= 0
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
    with serving(_Web) as address:
        yield address


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on loopback; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
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
    with pytest.raises(StorageError, match=r"x\.tar: .* failed: ClientPayloadError.*tried 6 times"):
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
    with pytest.raises(StorageError, match=rf"{name}: not a URL; .*%20"):
        storage.read_bytes(f"{web}/{name}")


class _Ranges(BaseHTTPRequestHandler):
    """The same 100 kB at every path, by ranges; /to/x redirects to /x. `connections` and `requests` are counted."""

    protocol_version = "HTTP/1.1"
    content = bytes(range(250)) * 400
    connections: ClassVar[set[Any]] = set()
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        _Ranges.connections.add(self.client_address)
        _Ranges.requests.append(self.path)
        if self.path == "/loop" or self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        if self.path == "/from-0":
            first, last = "0", str(int(last) - int(first))
        body = self.content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def ranges() -> Iterator[str]:
    _Ranges.connections.clear()
    _Ranges.requests.clear()
    with serving(_Ranges) as address:
        yield address


def test_one_connection_serves_all_ranges_of_all_files(ranges: str) -> None:
    for number in range(3):
        with storage.open_read(f"{ranges}/{number}.tar") as file:
            for start in (90_000, 10, 50_000, 0):
                file.seek(start)
                assert file.read(100) == _Ranges.content[start : start + 100]
    assert len(_Ranges.requests) == 3 * (1 + 4)
    assert len(_Ranges.connections) == 1


def test_many_files_at_once_take_a_connection_each_and_no_more(ranges: str) -> None:
    def read(number: int) -> bytes:
        return storage.read_bytes(f"{ranges}/{number}.tar", 7, 9)

    assert list(storage.in_parallel(read, range(40), threads=4)) == [_Ranges.content[7:16]] * 40
    assert len(_Ranges.connections) <= 4


def test_another_range_than_was_asked_for_is_an_error_even_if_it_is_as_long(ranges: str) -> None:
    for name, is_right in [("x.tar", True), ("from-0", False)]:
        file = storage.open_ranges(f"{ranges}/{name}")
        assert file is not None
        reading = file.begin(50_000, 100)
        if is_right:
            assert reading.result() == _Ranges.content[50_000:50_100]
            assert not file.is_paused
        else:
            with pytest.raises(ValueError, match="bytes from 50000, the server answered 'bytes 0-99/100000'"):
                reading.result()
            assert file.is_paused


def test_a_server_that_redirects_is_asked_plainly_once_and_not_once_per_file(ranges: str) -> None:
    for number in range(3):
        file = storage.open_ranges(f"{ranges}/to/{number}.tar")
        assert file is not None
        assert file.begin(50_000, 100).result() == _Ranges.content[50_000:50_100]
    assert _Ranges.requests == ["/to/0.tar", "/to/0.tar", "/0.tar", "/to/1.tar", "/1.tar", "/to/2.tar", "/2.tar"]


def test_a_server_that_redirects_for_ever_is_an_error(ranges: str) -> None:
    with pytest.raises(StorageError, match=r"/loop: open failed: TooManyRedirects.*retrying would not help"):
        storage.read_bytes(f"{ranges}/loop")


class _WeakTags(BaseHTTPRequestHandler):
    """4 bytes at every path, with a weak ETag. Only whole files, and the first byte, have Last-Modified: a 206 need not repeat it."""

    tag = 'W/"1"'

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", _WeakTags.tag)
        if wanted in (None, "bytes=0-0"):
            self.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
        first, last = (wanted or "bytes=0-3").removeprefix("bytes=").split("-")
        body = b"abcd"[int(first) : int(last) + 1]
        self.send_header("Content-Range", f"bytes {first}-{last}/4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_part_with_the_same_weak_etag_and_no_date_is_of_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(_WeakTags) as address:
        file = HttpFile(f"{address}/x.tar", 10.0)
        file.seek(1)
        assert file.read(2) == b"bc"
        monkeypatch.setattr(_WeakTags, "tag", 'W/"2"')
        with pytest.raises(ChangedError, match=r"x\.tar: it was replaced on the server"):
            file.read(2)
