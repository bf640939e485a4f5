"""Files on web servers: a query is part of the URL, and what fails on the way is asked for again or told."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data import storage
from data.storage import StorageError, retry


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
