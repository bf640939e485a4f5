"""Malformed and random requests: no server error, no traceback, no way to another file."""

from __future__ import annotations

import logging
import random
import string
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from pipeline.serving.joined import JoinedRun
from tests.pipeline.serving.conftest import LABELS, SHARD, TOKEN
from tests.serving import catalog, connected, fetch, metric, server_thread, wait_for
from tests.small_run import SmallRun

MALFORMED = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://localhost:99999999/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\nx",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /%zz%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n\x81\x05hello",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\n\r\n",
    b"GET /manifest.json?%ff=%00&&==&classes HTTP/1.1\r\nHost: localhost\r\n\r\n", b"A" * 20_000,
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
]  # fmt: skip


def rest(url: str, request: bytes) -> bytes:
    """Send bytes and half-close; return everything received, empty after a reset."""
    with connected(url) as client, suppress(ConnectionError):
        client.sendall(request)
        client.shutdown(1)
        found = b""
        while piece := client.recv(1 << 16):
            found += piece
        return found
    return b""


def test_malformed_requests_are_refused_without_a_traceback_and_without_repeating_them(
    locked: str, joined: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    with caplog.at_level(logging.INFO):
        for url in (joined, locked):
            for request in MALFORMED:
                head, _, tail = request.partition(b"\r\n")
                for sent in (request, head + b"\r\n" + secret + tail):
                    answer = rest(url, sent)
                    assert TOKEN.encode() not in answer
                    assert not answer or answer.split(b" ")[1][:1] in (b"1", b"2", b"4"), (sent, answer)
        wait_for(lambda: metric(joined, "noisy_student_serve_answering") == 0)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed + caplog.text
    assert TOKEN not in printed + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_bug_still_leaves_its_traceback(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(JoinedRun, "shard", lambda *_: 1 / 0)
    with server_thread(catalog(run)) as url:
        assert fetch(f"{url}/{SHARD}", {"Authorization": f"Bearer {TOKEN}"}).status == 500
    assert "ZeroDivisionError" in caplog.text
    assert TOKEN not in caplog.text


def test_a_name_in_the_log_is_one_line(
    run: SmallRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(JoinedRun, "shard", broken)
    with server_thread(catalog(run)) as url:
        assert fetch(f"{url}/shards/a%0aserve:%20forged%1b[2J.tar").status == 502
    assert capfd.readouterr().err.splitlines() == ["serve: /shards/a%0aserve:%20forged%1b[2J.tar: disk"]


PATHS = [
    "/", "/manifest.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/openapi.json", "/metrics", "/healthz", "/classes.txt",
    "/README.md", "/shards/pseudo-000000.tar", "/labels/pseudo-000000.parquet", "/pseudo-000000.tar", "/wids.json",
]  # fmt: skip
PIECES = [
    "..", "%2e%2e", "/", "%2f", "%5c", "\\", "%00", "%0a", "shards", "labels", "samples", "config.yaml", "done.json", ".tar",
    ".parquet", "gen-1", "é", "%ff", "~", ";", ":", "@", "*", "unlabeled-000000", "pseudo-000000", "index", "etc/passwd",
]  # fmt: skip
NAMES = [
    "Range", "If-Range", "If-Match", "If-None-Match", "Accept-Encoding", "Accept", "Host", "Authorization", "Connection",
    "X-Forwarded-Host", "Cookie", "If-Modified-Since", "Expect", "Transfer-Encoding", "Content-Length", "Content-Encoding",
    "Origin", "Referer", "TE", "Upgrade",
]  # fmt: skip
VALUES = [
    "bytes=0-9", "bytes=-5", "bytes=5-1", "bytes=0-1,2-3", "bytes=99999999999999999999-", "bytes=-0", "*", "W/*", '"x"', 'W/"x"',
    "gzip", "gzip;q=0", "*;q=0.5", "localhost", "evil.example", "127.0.0.1", "[::1]", "Bearer x", "Basic eA==", "Basic ?",
    "close", "keep-alive", "upgrade", "0", "5", "chunked", "100-continue", "text/html", "", " ", "\x7f", "é", ",,,", ";;;",
    "=" * 50,
]  # fmt: skip
QUERIES = [
    "min_confidence=0.5", "min_confidence=-1", "min_confidence=1e999", "min_confidence=nan", "classes=3", "classes=3,,4",
    "classes=-1", "classes=٣", "classes=99999999999999999999", "selected=false", "selected=maybe", "=", "&&", "a=%ff",
    "classes=%00", "x", "min_confidence=0_5",
]  # fmt: skip


STATUSES = [str(n).encode() for n in (100, 200, 206, 304, 400, 401, 404, 405, 412, 413, 416, 417, 421)]


def request_of(source: random.Random) -> bytes:
    """Return a random request, mostly well-formed, built from parts that matter."""
    path = source.choice(PATHS)
    if source.random() < 0.4:
        path = "/" + "".join(
            source.choice([*PIECES, source.choice(string.printable)]) for _ in range(source.randrange(1, 6))
        )
    if source.random() < 0.4:
        path += "?" + "&".join(source.choice(QUERIES) for _ in range(source.randrange(1, 4)))
    lines = [
        f"{source.choice(['GET', 'GET', 'GET', 'HEAD', 'POST', 'OPTIONS', 'PUT', 'X'])} {path} HTTP/1.{source.choice('11110')}"
    ]
    lines += [f"Host: {source.choice(['localhost', '127.0.0.1:80', 'evil.example'])}"] if source.random() < 0.9 else []
    lines += [f"{source.choice(NAMES)}: {source.choice(VALUES)}" for _ in range(source.randrange(4))]
    request = bytearray("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass"))
    if source.random() < 0.1:
        request[source.randrange(len(request))] = source.randrange(256)
    return bytes(request)


@pytest.mark.parametrize("kind", ["run", "v1"])
def test_no_request_is_a_server_error_or_a_way_to_another_file(
    run: SmallRun, kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(7)
    private = [
        path for name in ("config.yaml", "done.json", "quarantine.parquet") for path in (run.folder / "run").rglob(name)
    ]
    secrets = [path.read_bytes()[:40] for path in private]
    with server_thread(catalog(run, kind)) as url, ThreadPoolExecutor(8) as pool:
        requests = [request_of(source) for _ in range(500)]
        for request, answer in zip(requests, pool.map(lambda one: rest(url, one), requests), strict=True):
            assert not answer or answer.split(b" ")[1] in STATUSES, (request, answer[:300])
            assert not [one for one in secrets if one in answer], request
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 0)
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
