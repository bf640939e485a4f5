"""Helpers for tests of the server: run it in a thread or a process; send it requests."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from data.shards.write import write_shards
from pipeline.core.layout import Layout
from pipeline.core.schema import Config, ServeConfig
from pipeline.serving.catalog import Catalog
from pipeline.serving.server import open_catalog, serve_until
from teacher.selection.stage import select
from tests import HANGS_S
from tests.conftest import WriteDigits, png
from tests.pipeline.export.test_export import with_teacher
from tests.small_run import SmallRun


@dataclass(frozen=True)
class Answer:
    """A server's answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Parse the content as JSON."""
        return json.loads(self.content)


def fetch(url: str, headers: Mapping[str, str | bytes] | None = None, method: str = "GET") -> Answer:
    """Send one request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=HANGS_S)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def raw(url: str, request: bytes) -> bytes:
    """Send bytes; return everything received until the server closes the connection."""
    with connected(url) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def layout(run: SmallRun) -> Layout:
    """Return the layout of `make_run`'s run."""
    return Layout(str(run.folder / "run"))


def config(run: SmallRun, source: str = "run") -> Config:
    """Return the configuration of a server of the run, or of an export of it."""
    return run.config(serve={"source": source})


def catalog(run: SmallRun, source: str = "run") -> Any:
    """Open the catalog of such a server."""
    return open_catalog(config(run, source), [layout(run)])


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """Connect to a server; a small `receive_buffer` (bytes) soon blocks the sender."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        connection.settimeout(HANGS_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((parts.hostname, parts.port))
        yield connection


@contextmanager
def server_thread(catalog: Catalog, token: str | None = None, **fields: Any) -> Iterator[str]:
    """Run a server in a thread; yield its URL. `fields` are of ServeConfig."""
    reported: queue.Queue[str] = queue.Queue()
    ended = threading.Event()
    run = serve_until(
        catalog, ServeConfig(**{"port": 0, "grace_s": 0.0, "processes": 1, **fields}), token, ended.is_set, reported.put
    )
    thread = threading.Thread(target=asyncio.run, args=(run,))
    thread.start()
    try:
        yield reported.get(timeout=HANGS_S)
    finally:
        ended.set()
        thread.join(HANGS_S)
        assert not thread.is_alive(), "the server did not end"


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; fail after a minute."""
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.02)


def ask(connection: socket.socket, url: str, headers: str = "") -> None:
    """Send a GET request; the caller reads the answer."""
    parts = urlsplit(url)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    connection.sendall(f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}\r\n".encode())


def read_body(connection: socket.socket, number: int) -> bytes:
    """Read the headers and at least `number` bytes after them; return those bytes."""
    content = b""
    while b"\r\n\r\n" not in content or len(content) < number:
        piece = connection.recv(1 << 16)
        assert piece, "the server ended the connection"
        content += piece
    return content.partition(b"\r\n\r\n")[2]


def read_to_end(connection: socket.socket, wait_s: float = 0) -> tuple[bytes, bool]:
    """Sleep `wait_s` seconds and read to the end; return the bytes, and whether the server reset the connection."""
    content = b""
    time.sleep(wait_s)
    try:
        while piece := connection.recv(1 << 20):
            content += piece
    except ConnectionResetError:
        return content, True
    return content, False


def metric(url: str, name: str) -> float:
    """Return a value from the server's /metrics."""
    lines = fetch(f"{url}/metrics").content.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


class ServerProcess:
    """`stage=serve` as a command."""

    def __init__(self, *words: str, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "pipeline.run", "stage=serve", *words]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def url(self) -> str:
        """Wait until it listens; return its URL."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, f"{line}{self.process.stderr.read() if self.process.stderr else ''}"
        return line[line.index("http://") :].strip()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit code and stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=HANGS_S)
        return self.process.returncode, errors

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def served_by(process: int) -> list[int]:
    """The processes in which a server of several answers; not the one that multiprocessing starts to clean up."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def large_images(write: WriteDigits, num_bytes: int) -> WriteDigits:
    """Return `write` with `num_bytes` of noise after each unlabeled image, so that shards do not fit into socket buffers."""

    def write_large(folder: Path, start: int, stop: int, labeled: bool = True, per_shard: int = 100) -> list[int]:
        if labeled:
            return write(folder, start, stop, labeled, per_shard)
        noise, image = np.random.default_rng(0), png(np.zeros((8, 8), np.uint8))
        samples = ((f"{n:05d}", {"png": image + noise.bytes(num_bytes)}) for n in range(start, stop))
        write_shards(samples, str(folder), folder.name, per_shard)
        return []

    return write_large


def make_run(folder: Path, write: WriteDigits) -> SmallRun:
    """Make a run with labels and a selection."""
    run = SmallRun(folder, write)
    run.label(run.config(), with_teacher(run))
    select(run.config(), Layout(str(folder / "run")))
    return run
