"""A web server over an export, with the addresses of `stage=serve`, that can be told to fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from data.shards.split import Manifest

TOKEN = "a-token-of-the-tests"
Kind = Literal["503", "cut", "replaced"]


@dataclass
class LabelServer:
    """Where it is, what was asked (path, range), what to spoil next, and the token that it wants."""

    folder: Path
    address: str = ""
    token: str | None = None
    kind: Literal["export", "joined"] = "export"
    faults: list[tuple[Kind, str]] = field(default_factory=list)  # kind, part of the path; each once
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str, wanted: str | None) -> Kind | None:
        """The fault to make of an answer, once; a look at the first byte is spared all but a 503."""
        with self.lock:
            fits = [(k, part) for k, part in self.faults if part in path and (k == "503" or wanted != "bytes=0-0")]
            found = fits[0] if fits else None
            if found:
                self.faults.remove(found)
            return found[0] if found else None

    def content(self, path: str) -> bytes | None:
        """The file at an address; filters are taken and change nothing."""
        path, query, _ = path.partition("?")
        if query and self.kind == "export":
            return None
        if path == "/manifest.json":
            return json.dumps(self.manifest()).encode()
        name = path.removeprefix("/shards/").lstrip("/")
        return (self.folder / name).read_bytes() if (self.folder / name).is_file() else None

    def manifest(self) -> dict[str, Any]:
        """The contract of stage=serve, of an export."""
        manifest = Manifest.model_validate_json((self.folder / "manifest.json").read_text())
        shards = [
            {"name": (name := r.name.removesuffix(".tar")), "url": f"shards/{name}.tar", "labels_url": f"labels/{name}.parquet",
             "num_samples": r.num_samples, "sha256": r.sha256, "bytes": r.bytes}
            for r in manifest.shards
        ]  # fmt: skip
        return {
            "format": "noisy-student-pseudo-labels", "version": 1, "kind": self.kind, "generation": 1,
            "class_names": manifest.class_names, "num_samples": sum(s["num_samples"] for s in shards), "shards": shards,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        told, wanted = self.server.told, self.headers["Range"]
        told.asked.append((self.path, wanted))
        content = told.content(self.path)
        if told.token and self.headers["Authorization"] != f"Bearer {told.token}":
            self._send(401, b"no token", {})
        elif content is None:
            self._send(404, b"no such file", {})
        elif (fault := told.fault(self.path, wanted)) == "503":
            self._send(503, b"busy", {})
        else:
            content = content + b"\0" if fault == "replaced" else content
            self._send_part(content, wanted, 100 if fault == "cut" else None)

    def _send_part(self, content: bytes, wanted: str | None, keep: int | None) -> None:
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        if wanted is None or self.headers["If-Range"] not in (None, tag):
            self._send(200, content, {"ETag": tag}, keep)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1, len(content)) if last else len(content)
        part, place = content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, part, {"ETag": tag, "Content-Range": place}, keep)

    def _send(self, status: int, body: bytes, headers: dict[str, str], keep: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:keep])
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    told: LabelServer


@contextmanager
def label_server(folder: Path) -> Iterator[LabelServer]:
    """The server, in threads."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.told = LabelServer(folder, f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.told
        finally:
            server.shutdown()
            thread.join()
