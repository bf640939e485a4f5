"""A real S3 server for tests (moto, in a process of its own), behind a proxy that makes faults: 503s, cut and stalled answers."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from data import storage
from pipeline.core import lock
from tests import HANGS_S

BUCKET = "bucket"
SECRET = "a-secret-that-nobody-sees"
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_TOGETHER_S = 15.0  # less than a client waits
_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
Kind = Literal["503", "500", "403", "cut", "short", "slow", "stall", "deaf", "reset", "lost answer", "together"]


@dataclass
class Fault:
    """What to do to requests: `times` of those for which `matches(method, path)` holds, after the first `skip` of them.

    503, 500, 403: answered so, without asking the server. cut: the connection ends after `keep` bytes of the body. short: as if the
    body had `keep` bytes only. slow: the answer comes after `seconds`. stall: half a body (no answer, where there is none), then
    nothing for `seconds`. deaf: answered, but then nothing more is read from that connection. reset: no answer. lost answer: the
    server does what is asked, then as reset. together: answered when as many wait as `barrier` is for, or after _TOGETHER_S.
    """

    kind: Kind
    matches: Callable[[str, str], bool]
    times: int = 1
    skip: int = 0
    keep: int = 0
    seconds: float = 60
    barrier: threading.Barrier | None = None
    done: int = 0


@dataclass
class FaultyS3:
    """The server behind its proxy: where it is, what to spoil, and what was asked."""

    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "GET /bucket/key"
    at_once: int = 0  # requests that are being answered
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)  # ends stalls

    def add(self, kind: Kind, method: str = "", part: str = "", times: int = 1, **options: Any) -> Fault:
        """Spoil requests whose method is `method` and whose path contains `part` (all, when empty)."""
        fault = Fault(kind, lambda m, p: method in ("", m) and part in p, times, **options)
        self.faults.append(fault)
        return fault

    def answer_together(self, part: str, number: int) -> threading.Barrier:
        """Answer the first `number` GETs whose path contains `part` only when all of them wait; broken if they do not come."""
        barrier = threading.Barrier(number)
        self.add("together", "GET", part, times=number, barrier=barrier)
        return barrier

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count a request as being answered."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    def fault_for(self, method: str, path: str) -> Fault | None:
        """The fault to make of this request, counted."""
        with self.lock:
            self.requests.append(f"{method} {path}")
            for fault in self.faults:
                if fault.matches(method, path) and fault.done < fault.times:
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.done += 1
                    return fault
        return None


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, s3: FaultyS3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.s3 = port, s3
        self.open: set[socket.socket] = set()

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away; a test that fails shows why."""

    def end(self) -> None:
        """Stop, and end connections that are kept alive."""
        self.s3.over.set()
        self.shutdown()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _serve(self) -> None:
        with self.server.s3.counting():
            self._respond()

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.s3.fault_for(self.command, self.path)
        kind = fault.kind if fault else ""
        if kind in ("503", "500", "403"):
            self._answer(int(kind), {}, _SLOW_DOWN if kind == "503" else b"")
            return
        if kind == "reset":
            self._hang_up()
            return
        if fault and fault.barrier:
            with suppress(threading.BrokenBarrierError):
                fault.barrier.wait(_TOGETHER_S)
        status, headers, content = self._ask(body)
        if fault and kind == "cut":
            self._answer(status, headers, content, send=fault.keep)
            self._hang_up()
        elif fault and kind == "short":
            self._answer(status, headers, content[: fault.keep])
        elif fault and kind == "stall":
            if content:
                self._answer(status, headers, content, send=len(content) // 2)
            self.server.s3.over.wait(fault.seconds)
            self._hang_up()
        elif kind == "lost answer":
            self._hang_up()
        else:
            self.server.s3.over.wait(fault.seconds if fault and kind == "slow" else 0)
            self._answer(status, headers, content)
            self.server.s3.over.wait(fault.seconds if fault and kind == "deaf" else 0)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 (the base class's names)

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Pass the request on to the server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=HANGS_S)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            with connection.getresponse() as response:
                return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], content: bytes, send: int | None = None) -> None:
        self.send_response_only(status)
        lengths = [value for name, value in headers.items() if name.lower() == "content-length"]
        for name, value in headers.items():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        told = lengths[0] if self.command == "HEAD" and lengths else str(len(content))
        self.send_header("Content-Length", told)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:send])
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_server() -> Iterator[FaultyS3]:
    """Start server and proxy, with an empty BUCKET; stop them at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _make_bucket(process, port)
            with _proxy(port) as s3:
                yield s3
        finally:
            process.terminate()


@contextmanager
def _proxy(port: int) -> Iterator[FaultyS3]:
    s3 = FaultyS3()
    proxy = _Proxy(port, s3)
    s3.endpoint = f"http://127.0.0.1:{proxy.server_port}"
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        proxy.end()
        thread.join()


def _make_bucket(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server answers, and make the bucket."""
    deadline = time.monotonic() + HANGS_S
    while True:
        assert process.poll() is None, "the S3 server ended at its start"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().read() is not None
            return
        except OSError:
            assert time.monotonic() < deadline, "the S3 server did not answer"
            time.sleep(0.1)
        finally:
            connection.close()


# what tests let another process do: here, because this module is imported fast


def replace_and_add(folder: str) -> None:
    """x.bin anew, and new.bin."""
    storage.write_bytes(f"{folder}/x.bin", b"new")
    storage.write_bytes(f"{folder}/new.bin", b"")


def try_to_write(url: str) -> str:
    """Write a small file; `written`, or why it could not be."""
    try:
        storage.write_bytes(url, b"x")
    except storage.StorageError as error:
        return str(error)
    return "written"


def hold_lease(run_dir: str) -> None:
    """A driver that works until it is killed."""
    with lock.run_lock(run_dir, "the first command"):
        time.sleep(600)


def put(url: str, content: bytes) -> str:
    """Write a file; its URL."""
    storage.write_bytes(url, content)
    return url
