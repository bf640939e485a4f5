"""Many concurrent clients: exported shards beside nginx sending the same files, and labels joined to images while sending.

    python -m benchmarks.bench_serve [clients=64] [seconds=8] [rounds=3] [shards=8] [images=2000] [nginx=nginx]

JPEG photos of 50 kB in the page cache, on loopback. Each client requests one shard after the other on a connection of its own and
drops the bytes in the kernel (MSG_TRUNC), so that clients take little CPU. Before timing, the first shard from ours and from nginx
is compared with the file. Medians over rounds; contenders take turns. Memory is that of a server's processes, sampled twice a second;
CPU seconds per GB sent are theirs too, and hardly change when the machine has other work.

    ours     stage=serve, an exported version: a process per core, sendfile
    nginx    Debian's configuration: a process per core, sendfile, tcp_nopush; needs its package (apt-get install nginx), or
             nginx=PATH
    joined   stage=serve, labels joined to the photos' own shards; no peer does that
    new      the same, each request with a filter of its own (which every label passes), so that each shard is laid out anew
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.bench_export import NUM_CLASSES, bench_overlay
from benchmarks.photos import make_photos
from benchmarks.scratch import fresh_folder
from data import storage
from data.labels.overlay import Overlay
from data.settings import run_command
from pipeline.core.schema import Config, ExportConfig, ServeConfig
from pipeline.export.manifests import read_manifest, write_manifests
from pipeline.export.plan import plan_files
from pipeline.export.tasks import ExportJob, make_file
from pipeline.serving.catalog import Catalog
from pipeline.serving.exported import ExportedVersion
from pipeline.serving.joined import JoinedRun
from pipeline.serving.server import serve_until

_BLOCK = 1 << 20
_START_S = 60.0
_FILTERS = 10_000  # more than requests in a round


def bench(
    clients: int = 64,
    seconds: float = 8,
    rounds: int = 3,
    shards: int = 8,
    images: int = 2000,
    nginx: str = "nginx",
    out: str = "runs/bench_serve",
) -> None:
    """Print megabytes per second of each contender."""
    overlay = bench_overlay(make_photos(f"{out}/photos", shards, images // shards), f"{out}/labels", f"{out}/selection")
    overlay = replace(overlay, digests={shard.name: _digests(overlay, shard.name) for shard in overlay.shards})
    folder = _export(overlay, f"{out}/exported")
    names = [record.name for record in read_manifest(folder).shards]
    exported = ExportedVersion("bench", 1, None, [], folder, read_manifest(folder).shards, {})
    with ExitStack() as stack:
        ours = stack.enter_context(_server(exported))
        joined = stack.enter_context(_server(JoinedRun("bench", 1, None, [], overlay, NUM_CLASSES)))
        contenders = {"ours": (*ours, [f"/shards/{name}" for name in names])}
        if (program := shutil.which(nginx, path=f"{os.environ.get('PATH', '')}:/usr/sbin")) is None:
            print(f"{nginx}: no such program; install Debian's package nginx, or set nginx=PATH")
        else:
            contenders["nginx"] = (*stack.enter_context(_nginx(program, folder)), [f"/{name}" for name in names])
        for contender in contenders.values():
            _check(contender[0], contender[2][0], Path(folder) / names[0])
        paths = [f"/shards/{shard.name}.tar" for shard in overlay.shards]
        contenders["joined"] = (*joined, paths)
        contenders["new"] = (*joined, [f"{path}?min_confidence={n}e-9" for n in range(1, _FILTERS) for path in paths])
        _compare(contenders, clients, seconds, rounds)


def _compare(contenders: dict[str, tuple[int, int, list[str]]], clients: int, seconds: float, rounds: int) -> None:
    found: dict[str, list[_Measured]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, (port, pid, paths) in contenders.items():
            measured = _stream(port, paths, clients, seconds if number else 1, pid)
            if number:  # the first round is warm-up
                found[name].append(measured)
    rates = {name: round(median(one.rate for one in measured)) for name, measured in found.items()}
    cpu = {name: round(median(one.cpu_s for one in measured), 3) for name, measured in found.items()}
    memory = {name: [one.memory_mb for one in measured] for name, measured in found.items()}
    for name, rate in rates.items():
        print(f"{name:7} {rate:8,} MB/s {cpu[name]:8.3f} s of CPU a GB   memory, MB, by round: {memory[name]}")
    peers = {"nginx": rates["nginx"]} if "nginx" in rates else {}
    print(
        json.dumps(
            {
                "bench": "serve", "unit": "MB/s up", "ours": rates["ours"], "peers": peers, "floor": None,
                "joined": rates["joined"], "new": rates["new"], "cpu_s": cpu, "memory_mb": max(memory["ours"]),
                "joined_memory_mb": max(memory["joined"]), "seeds": rounds,
            }
        )
    )  # fmt: skip


def _digests(overlay: Overlay, name: str) -> str:
    files = (storage.join(folder, f"{name}.parquet") for folder in (overlay.labels_dir, overlay.selection_dir))
    return "".join(hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in files)


def _export(overlay: Overlay, folder: str) -> str:
    """Return an export, written in this process."""
    fresh_folder(folder)
    config = Config(export=ExportConfig(samples_per_shard=overlay.shards[0].num_samples))
    job = ExportJob(overlay, config.export, str(Path(folder).absolute()))
    records = [make_file(job, file) for file in plan_files(config, overlay)[0]]
    write_manifests(job.folder, records, overlay.provenance.class_names, True)
    return job.folder


@contextmanager
def _server(catalog: Catalog) -> Iterator[tuple[int, int]]:
    """Run our server in a process of its own; yield port and process id."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(catalog, there))
    process.start()
    try:
        yield int(here.recv().rpartition(":")[2]), process.pid or 0
    finally:
        process.terminate()
        process.join()


def _serve(catalog: Catalog, pipe: Connection) -> None:
    asyncio.run(serve_until(catalog, ServeConfig(port=0), None, lambda: False, pipe.send))


@contextmanager
def _nginx(program: str, folder: str) -> Iterator[tuple[int, int]]:
    """Run nginx; yield port and process id."""
    home = Path(folder).parent.absolute() / "nginx"
    home.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary = "".join(
        f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = (
        f"worker_processes auto; pid {home}/pid; daemon off; error_log {home}/error.log;\n"
        f"events {{ worker_connections 768; }}\nhttp {{ {temporary} access_log off; sendfile on; tcp_nopush on;\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    (home / "nginx.conf").write_text(f"user {os.environ.get('USER', 'root')};\n{text}" if os.geteuid() == 0 else text)
    with subprocess.Popen([program, "-p", str(home), "-c", str(home / "nginx.conf")]) as process:
        try:
            _wait_for(port)
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _check(port: int, path: str, file: Path) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    assert connection.getresponse().read() == file.read_bytes(), f"{path} on port {port} is not {file}"
    connection.close()


class _Client:
    """A connection that requests one file after the other and drops the bytes."""

    def __init__(self, port: int, paths: Sequence[str], first: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self._paths, self._next, self._left = paths, first, 0
        self._block = bytearray(_BLOCK)
        self._ask()

    def _ask(self) -> None:
        path = self._paths[self._next % len(self._paths)]
        self._next += 1
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())

    def receive(self) -> int:
        """Receive; return the number of bytes of the file."""
        if not self._left:
            head, end, _ = self.socket.recv(4096, socket.MSG_PEEK).partition(b"\r\n\r\n")
            if not end:
                return 0
            self.socket.recv(len(head) + len(end))
            assert head.startswith(b"HTTP/1.1 200"), head
            self._left = int(head.lower().partition(b"content-length:")[2].split()[0])
        count = self.socket.recv_into(self._block, min(_BLOCK, self._left), socket.MSG_TRUNC)  # dropped, not copied
        assert count, "the server ended the connection"
        self._left -= count
        if not self._left:
            self._ask()
        return count


class _Measured(NamedTuple):
    """MB/s of all clients together; CPU seconds per GB and the most memory, in MB, of the server's processes."""

    rate: float
    cpu_s: float
    memory_mb: int


def _stream(port: int, paths: Sequence[str], clients: int, seconds: float, pid: int) -> _Measured:
    """Let clients request files for so many seconds."""
    done, held, selector = 0, 0, selectors.DefaultSelector()
    for number in range(clients):
        client = _Client(port, paths, number * (len(paths) // clients or 1))
        selector.register(client.socket, selectors.EVENT_READ, client)
    cpu_before, started = _cpu_s(pid), time.perf_counter()
    looked = started
    while (now := time.perf_counter()) < started + seconds:
        for key, _ in selector.select(1):
            done += key.data.receive()
        if now > looked + 0.5:
            held, looked = max(held, _memory_mb(pid)), now
    cpu_s = _cpu_s(pid) - cpu_before
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    selector.close()
    return _Measured(done / (now - started) / 1e6, cpu_s / done * 1e9, held)


def _memory_mb(pid: int) -> int:
    """Return the resident memory of a process and its children, in MB; what they share counts for each."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1_000_000 + sum(map(_memory_mb, _children(pid)))


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its children, in seconds."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") + sum(map(_cpu_s, _children(pid)))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


if __name__ == "__main__":
    sys.exit(run_command(bench, sys.argv[1:], __doc__ or ""))
