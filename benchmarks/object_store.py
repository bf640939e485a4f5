"""A small object store for benchmarks: the files of a folder, by S3's requests, each answered after a fixed latency.

    python -m benchmarks.object_store folder=FOLDER [port=0]

Prints its port. The folder is in the bucket `ms-30`, whose answers come 30 ms after the request, and in any other `ms-N`; as many at
once as are asked for. Answers GET with and without a range, HEAD and ListObjectsV2, believes every signature, and writes nothing.
`GET /` gives what was counted so far, as JSON. One process, asyncio: a request costs about 0.1 ms of CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import urlopen
from xml.sax.saxutils import escape

from data.settings import run_command

_END_OF_HEADERS = b"\r\n\r\n"
_NO_SUCH_KEY = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>There is no such key.</Message></Error>'


class _Connection(asyncio.Protocol):
    """One client's connection: requests in turn, without bodies."""

    def __init__(self, folder: Path, counts: Counter[str]) -> None:
        self._folder, self._counts = folder, counts
        self._received = b""
        counts["connections"] += 1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while _END_OF_HEADERS in self._received:
            head, _, self._received = self._received.partition(_END_OF_HEADERS)
            method, target, *_ = head.decode("latin-1").split(" ", 2)
            lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
            headers = {name.lower(): value.strip() for name, _, value in lines}
            address = urlsplit(target)
            bucket, _, key = unquote(address.path).lstrip("/").partition("/")
            latency_ms = float(bucket.removeprefix("ms-") or 0)
            asked = method, key, parse_qs(address.query, keep_blank_values=True), headers.get("range", ""), bucket == ""
            asyncio.get_running_loop().call_later(latency_ms / 1000, self._answer, *asked)

    def _answer(self, method: str, key: str, query: dict[str, list[str]], wanted: str, is_count: bool) -> None:
        status, extra, body = (
            (200, {}, json.dumps(self._counts).encode()) if is_count else self._content(method, key, query, wanted)
        )
        self._counts["requests"] += 1
        length = extra.pop("Content-Length", str(len(body)))
        told = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
        if not self._transport.is_closing():
            start = f"HTTP/1.1 {status} -\r\nContent-Length: {length}\r\n{told}\r\n".encode()
            self._transport.write(start if method == "HEAD" else start + body)

    def _content(
        self, method: str, key: str, query: dict[str, list[str]], wanted: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        if "list-type" in query:
            return 200, {"Content-Type": "application/xml"}, self._listing(query)
        file = self._folder / key
        if not file.is_file():
            return 404, {"Content-Type": "application/xml"}, _NO_SUCH_KEY
        facts = file.stat()
        headers = {"ETag": f'"{facts.st_mtime_ns:x}-{facts.st_size:x}"', "Accept-Ranges": "bytes"}
        headers["Last-Modified"] = "Thu, 01 Jan 2026 00:00:00 GMT"
        if method == "HEAD":
            return 200, headers | {"Content-Length": str(facts.st_size)}, b""
        if not wanted:
            return 200, headers, self._read(file, 0, facts.st_size)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) if last else facts.st_size - 1, facts.st_size - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{facts.st_size}"
        return 206, headers, self._read(file, start, end + 1 - start)

    def _read(self, file: Path, start: int, length: int) -> bytes:
        self._counts["bytes"] += length
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, start)
        finally:
            os.close(descriptor)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        """ListObjectsV2 with the delimiter `/`: the files and folders whose keys begin with the prefix."""
        prefix = query.get("prefix", [""])[0]
        folder, _, start = prefix.rpartition("/")
        found = sorted(p for p in (self._folder / folder).glob("*") if p.name.startswith(start))
        keys = [(f"{folder}/{path.name}" if folder else path.name, path) for path in found]
        files = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{path.stat().st_mtime_ns:x}-{path.stat().st_size:x}&quot;</ETag><Size>{path.stat().st_size}</Size></Contents>"
            for key, path in keys
            if path.is_file()
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{escape(key)}/</Prefix></CommonPrefixes>" for key, path in keys if path.is_dir()
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>false</IsTruncated>{files}{folders}</ListBucketResult>"
        ).encode()


async def _serve(folder: str, port: int) -> None:
    counts: Counter[str] = Counter()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(Path(folder), counts), "127.0.0.1", port, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def serve(folder: str, port: int = 0) -> None:
    """Serve until killed."""
    asyncio.run(_serve(folder, port))


@contextmanager
def object_store(folder: str) -> Iterator[str]:
    """A server of `folder` in a process of its own, for the block; give its address."""
    command = [sys.executable, "-m", "benchmarks.object_store", f"folder={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def counted(address: str) -> dict[str, int]:
    """What a server has counted: `requests`, `connections`, `bytes`."""
    with urlopen(address) as answer:
        return dict(json.load(answer))


if __name__ == "__main__":
    sys.exit(run_command(serve, sys.argv[1:], __doc__ or ""))
