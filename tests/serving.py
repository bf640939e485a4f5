"""A server in a thread or in a process of its own, and plain requests to it."""

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.serving.catalog import Catalog
from pipeline.serving.listening import Settings, serve_until

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """The content."""
        return json.loads(self.content)


def fetch(url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Answer:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def raw(url: str, request: bytes) -> bytes:
    """What comes back for these bytes until the server ends the connection."""
    with connected(url) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@contextmanager
def connected(url: str, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection; with a small receive buffer, one that soon holds up its sender."""
    parts = urlsplit(url)
    with socket.socket() as connection:
        connection.settimeout(_TIMEOUT_S)
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect((parts.hostname, parts.port))
        yield connection


@contextmanager
def server_thread(catalog: Catalog, **settings: Any) -> Iterator[str]:
    """A server in this process; its URL."""
    said: queue.Queue[str] = queue.Queue()
    ended = threading.Event()
    run = serve_until(catalog, Settings(**{"grace_s": 0.0, **settings}), ended.is_set, said.put)
    thread = threading.Thread(target=asyncio.run, args=(run,))
    thread.start()
    try:
        yield said.get(timeout=_TIMEOUT_S)
    finally:
        ended.set()
        thread.join(_TIMEOUT_S)
        assert not thread.is_alive(), "the server did not end"


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
        """Where it listens, when it does."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, f"{line}{self.process.stderr.read() if self.process.stderr else ''}"
        return line[line.index("http://") :].strip()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr, after a signal."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=_TIMEOUT_S)
        return self.process.returncode, errors

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
