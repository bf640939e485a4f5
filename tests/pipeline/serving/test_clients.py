"""Slow, many and leaving clients; servers that stop; files that change while they are served."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from data import storage
from pipeline.core.layout import Layout
from pipeline.core.lock import run_lock
from pipeline.export.stage import export
from pipeline.run import main
from pipeline.serving import sending, server
from pipeline.serving.catalog import Catalog
from pipeline.serving.exported import open_version
from pipeline.serving.joined import JoinedRun
from tests.conftest import WriteDigits, make_writer
from tests.s3_server import FaultyS3
from tests.serving import (
    ServerProcess,
    ask,
    catalog,
    connected,
    fetch,
    large_images,
    make_run,
    metric,
    read_body,
    read_to_end,
    served_by,
    server_thread,
    wait_for,
)
from tests.small_run import SmallRun

IMAGE_BYTES = 400_000  # 20 MB a shard
ALL = "?selected=false"
SHARD = f"shards/unlabeled-000000.tar{ALL}"
EXPORTED = "shards/pseudo-000000.tar"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[SmallRun]:
    """A run and its export, with shards of 20 MB."""
    run = make_run(tmp_path_factory.mktemp("large"), large_images(make_writer(digits), IMAGE_BYTES))
    export(run.config(export={"samples_per_shard": 50}), Layout(str(run.folder / "run")))
    yield run
    ray.shutdown()


@pytest.fixture(params=["run", "latest"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def path_of(source: str) -> str:
    return SHARD if source == "run" else EXPORTED


def words(run: SmallRun, *more: str) -> list[str]:
    return [f"run_dir={run.folder}/run", "serve.port=0", "serve.source=run", *more]


def test_many_clients_at_once_get_the_same_bytes(run: SmallRun, source: str) -> None:
    with server_thread(catalog(run, source)) as url, ThreadPoolExecutor(16) as pool:
        contents = set(pool.map(lambda _: fetch(f"{url}/{path_of(source)}").content, range(16)))
    assert [len(content) > 50 * 0.9 * IMAGE_BYTES for content in contents] == [True]


def test_clients_that_read_nothing_take_little_memory_and_leak_no_file(run: SmallRun) -> None:
    with ServerProcess(*words(run, "serve.processes=1")) as process, ExitStack() as clients:
        url = process.url()
        whole = fetch(f"{url}/{SHARD}").content
        before = metric(url, "process_resident_memory_bytes")
        for _ in range(40):
            ask(clients.enter_context(connected(url, receive_buffer=4096)), f"{url}/{SHARD}")
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 40)
        assert fetch(f"{url}/{SHARD}").content == whole
        assert metric(url, "process_resident_memory_bytes") - before < 40 * 4e6
        files = Path(f"/proc/{process.process.pid}/fd")
        assert _num_tars(files) == 40
        clients.close()
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 0)
        wait_for(lambda: _num_tars(files) == 0)


@pytest.mark.slow
def test_ctrl_c_reaches_every_process_and_answers_may_still_end(run: SmallRun) -> None:
    """A terminal sends the signal to each process."""
    more = "serve.processes=2", "serve.grace_s=60"
    with ServerProcess(*words(run, *more)) as process, ExitStack() as clients:
        url = process.url()
        whole = fetch(f"{url}/{SHARD}").content
        client = clients.enter_context(connected(url, receive_buffer=4096))
        ask(client, f"{url}/{SHARD}", "Connection: close\r\n")
        got = read_body(client, 1)
        for number in (*served_by(process.process.pid), process.process.pid):
            os.kill(number, signal.SIGINT)
        rest, is_broken_off = read_to_end(client)
        assert (got + rest == whole, is_broken_off) == (True, False)
        process.process.communicate(timeout=60)


def _num_tars(files: Path) -> int:
    """Count the shards that a process holds open, in its /proc/PID/fd."""
    number = 0
    for link in files.iterdir():
        with suppress(FileNotFoundError):  # closed since the listing
            number += link.readlink().suffix == ".tar"
    return number


def test_a_stalled_client_is_disconnected(run: SmallRun, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SEND_TIMEOUT_S", 0.3)
    with server_thread(catalog(run, source)) as url, connected(url, receive_buffer=4096) as client:
        ask(client, f"{url}/{path_of(source)}")
        wait_for(lambda: metric(url, "noisy_student_serve_connections") == 1)  # this question's own
        content, is_broken_off = read_to_end(client)
    assert is_broken_off
    assert len(content) < 50 * IMAGE_BYTES


def test_beyond_the_limit_clients_get_503_and_retry_after(run: SmallRun, source: str) -> None:
    with server_thread(catalog(run, source), max_connections=2) as url, ExitStack() as clients:
        for _ in range(2):
            ask(clients.enter_context(connected(url, receive_buffer=4096)), f"{url}/{path_of(source)}")
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 2)
        refused = fetch(f"{url}/manifest.json")
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        assert fetch(f"{url}/healthz").status == 200
        clients.close()
        wait_for(lambda: fetch(f"{url}/manifest.json").status == 200)


def test_idle_connections_are_closed_for_new_ones_and_busy_ones_stay(
    run: SmallRun, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_SPARE_CONNECTIONS", 2)
    with server_thread(catalog(run, source), max_connections=1) as url, ExitStack() as clients:
        whole = fetch(f"{url}/{path_of(source)}").content
        download = clients.enter_context(connected(url, receive_buffer=65536))
        ask(download, f"{url}/{path_of(source)}", "Connection: close\r\n")
        got = read_body(download, 100_000)
        half_open = [clients.enter_context(connected(url)) for _ in range(12)]
        for number, client in enumerate(half_open):
            with suppress(ConnectionError):  # given up for a later one
                client.sendall(b"GET / HTTP/1.1\r\nX: " if number % 2 else b"")
        for _ in range(3):
            assert fetch(f"{url}/healthz").status == 200
            assert metric(url, "noisy_student_serve_connections") <= 3
        rest, is_broken_off = read_to_end(download)
    assert got + rest == whole
    assert not is_broken_off


def test_a_connection_without_a_whole_request_is_closed_soon(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server._CONNECTION["keepalive_timeout"] <= 10
    monkeypatch.setitem(server._CONNECTION, "keepalive_timeout", 0.5)
    with server_thread(catalog(run)) as url, ExitStack() as clients:
        for start in (b"", b"GET /manifest.json HTT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "):
            client = clients.enter_context(connected(url))
            client.sendall(start)
            assert read_to_end(client)[0] == b""


def test_clients_that_do_not_read_a_document_are_disconnected(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SEND_TIMEOUT_S", 0.3)
    served = catalog(run)
    assert isinstance(served, JoinedRun)
    names = tuple(f"{number:05d}" + "x" * 900 for number in range(20_000))
    with server_thread(replace(served, class_names=names)) as url, connected(url, receive_buffer=4096) as client:
        assert len(fetch(f"{url}/manifest.json").content) > 18_000_000
        ask(client, f"{url}/manifest.json")
        content, is_broken_off = read_to_end(client, wait_s=2)
    assert is_broken_off
    assert len(content) < 18_000_000


def _is_closed(url: str) -> bool:
    try:
        return fetch(f"{url}/healthz").status != 200
    except (ConnectionError, http.client.HTTPException):
        return True


@pytest.mark.slow
def test_a_download_continues_after_the_server_was_killed_and_restarted(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as first:
        whole = fetch(f"{(url := first.url())}/{SHARD}")
        with connected(url) as client:
            ask(client, f"{url}/{SHARD}")
            got = read_body(client, 3_000_000)
            first.process.kill()
    assert got == whole.content[: len(got)]
    with run_lock(f"{run.folder}/run", "another command"), ServerProcess(*words(run)) as second:
        url = second.url()
        rest = fetch(f"{url}/{SHARD}", {"Range": f"bytes={len(got)}-", "If-Range": whole.headers["ETag"]})
        code, errors = second.end(signal.SIGTERM)
    assert rest.status == 206
    assert got + rest.content == whole.content
    assert code == 128 + signal.SIGTERM
    assert "stopped (SIGTERM)" in errors
    assert "Traceback" not in errors


def test_a_server_that_stops_finishes_what_it_sends(run: SmallRun, source: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        with server_thread(catalog(run, source), grace_s=60.0) as url:
            whole = fetch(f"{url}/{path_of(source)}").content
            client = pool.submit(_read_slowly, f"{url}/{path_of(source)}")
            wait_for(lambda: metric(url, "noisy_student_serve_answering") == 1)
        assert client.done() or client.running()
        assert client.result() == whole


def _read_slowly(url: str) -> bytes:
    """Read a file; its end only after the server has stopped accepting."""
    with connected(url, receive_buffer=65536) as client:
        ask(client, url, "Connection: close\r\n")
        content = read_body(client, 100_000)
        wait_for(lambda: _is_closed(url))
        time.sleep(0.5)  # longer than an end without any grace takes
        return content + read_to_end(client)[0]


def test_an_unfinished_client_is_disconnected_after_the_grace_period(run: SmallRun, source: str) -> None:
    with ExitStack() as client:
        started = time.monotonic()
        with server_thread(catalog(run, source), grace_s=0.5) as url:
            ask(client.enter_context(connected(url, receive_buffer=4096)), f"{url}/{path_of(source)}")
            wait_for(lambda: metric(url, "noisy_student_serve_answering") == 1)
        assert time.monotonic() - started < 30  # and the thread has ended


def test_a_shard_or_label_file_that_has_changed_is_not_sent(
    run: SmallRun,
) -> None:
    served = catalog(run)
    assert isinstance(served, JoinedRun)
    shard, labels = (
        run.folder / "unlabeled/unlabeled-000000.tar",
        Path(served.overlay.labels_dir) / "unlabeled-000000.parquet",
    )
    for path, message, other in (
        (shard, "bytes now", "labels/unlabeled-000000.parquet"),
        (labels, "have changed", SHARD),
    ):
        content, before = path.read_bytes(), path.stat()
        for changed in (content[:-1], content + b"x", None):
            path.unlink() if changed is None else path.write_bytes(changed)
            with server_thread(served) as url:
                for what in (SHARD, other):
                    answer = fetch(f"{url}/{what}")
                    assert (answer.status, message in answer.json()["error"]) == (409, True)
                    assert str(run.folder) not in answer.json()["error"]
                assert fetch(f"{url}/shards/unlabeled-000001.tar").status == 200
            path.write_bytes(content)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with server_thread(served) as url:
            assert fetch(f"{url}/{SHARD}").status == 200


def test_truncating_a_shard_while_it_is_sent_resets_the_connection(
    run: SmallRun, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "unlabeled/unlabeled-000000.tar" if source == "run" else "run/exports/v1/pseudo-000000.tar"
    path = run.folder / name
    content = path.read_bytes()
    try:
        with server_thread(catalog(run, source)) as url, connected(url, receive_buffer=65536) as client:
            ask(client, f"{url}/{path_of(source)}")
            got = read_body(client, 100_000)
            os.truncate(path, 15_000_000)
            more, is_broken_off = read_to_end(client)
    finally:
        path.write_bytes(content)
    assert is_broken_off
    assert len(got) + len(more) < 15_000_000
    assert path.name in capfd.readouterr().err


def test_missing_files_and_links_out_of_an_export_are_not_sent(run: SmallRun, tmp_path: Path) -> None:
    served = catalog(run, "v1")
    secret = tmp_path / "secret"
    for name, path in (
        (EXPORTED, "pseudo-000000.tar"),
        ("labels/pseudo-000000.parquet", "labels/pseudo-000000.parquet"),
    ):
        file = run.folder / "run/exports/v1" / path
        content, before = file.read_bytes(), file.stat()
        secret.write_bytes(content)
        file.unlink()
        with server_thread(served) as url:
            missing = fetch(f"{url}/{name}")
            assert (missing.status, "missing" in missing.json()["error"]) == (409, True)
            file.symlink_to(secret)
            link = fetch(f"{url}/{name}")
            assert (link.status, "link to outside" in link.json()["error"]) == (409, True)
        file.unlink()
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with server_thread(served) as url:
        assert fetch(f"{url}/{EXPORTED}").status == 200


def test_a_corpus_and_an_export_in_an_object_store_are_served_as_local_ones(
    run: SmallRun, s3: FaultyS3, folder: str
) -> None:
    local, remote = catalog(run), f"{folder}/v1"
    assert isinstance(local, JoinedRun)
    for shard in local.overlay.shards[:1]:
        storage.write_bytes(f"{folder}/{shard.name}.tar", Path(shard.url).read_bytes())
    url = f"{folder}/unlabeled-000000.tar"
    first = replace(local.overlay.shards[0], url=url, version=storage.file_info(url).version)
    moved = (first, *local.overlay.shards[1:])
    version = run.folder / "run/exports/v1"
    for file in (file for file in version.rglob("*") if file.is_file()):
        storage.write_bytes(f"{remote}/{file.relative_to(version)}", file.read_bytes())
    span = {"Range": "bytes=1234567-7654321"}
    far: list[tuple[Catalog, Catalog, str]] = [
        (local, replace(local, overlay=replace(local.overlay, shards=moved)), SHARD),
        (catalog(run, "v1"), open_version(remote, []), EXPORTED),
    ]
    for near, distant, path in far:
        with server_thread(near) as here, server_thread(distant) as there:
            assert fetch(f"{here}/{path}").content == fetch(f"{there}/{path}").content
            s3.add("cut", "GET", keep=100)
            assert fetch(f"{here}/{path}", span).content == fetch(f"{there}/{path}", span).content


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["serve.host=0.0.0.0"], "serve.host=0.0.0.0: others can reach it, and there is no token"),
        (["serve.token_file=/none"], "serve.token_file=/none: expected a file with a token"),
        (["serve.source=v7"], "exports/v7: stage export is not done"),
        (["serve.source=v0"], "serve.source='v0'"),
        (["serve.source=latest", "export.out=/none"], "no export yet"),
    ],
)
def test_startup_errors_have_a_message_and_no_traceback(
    run: SmallRun, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["stage=serve", *words(run, *more)]) == 2
    assert message in capsys.readouterr().err


def test_the_clients_token_alone_does_not_start_a_server(
    run: SmallRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOISY_STUDENT_TOKEN", "s3cret-of-mine")
    assert main(["stage=serve", *words(run)]) == 2
    said = capsys.readouterr().err
    assert "expected the server's token in NOISY_STUDENT_SERVER_TOKEN, or serve.token_file=FILE" in said
    assert "s3cret-of-mine" not in said


def test_an_address_in_use_and_an_export_without_images_are_errors(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, write_digits)
    with server_thread(catalog(run)) as url:
        assert main(["stage=serve", f"run_dir={tmp_path}/run", f"serve.port={url.rpartition(':')[2]}"]) == 2
    assert "address already in use" in capsys.readouterr().err
    export(run.config(export={"format": "csv"}), Layout(str(tmp_path / "run")))
    assert main(["stage=serve", f"run_dir={tmp_path}/run", "serve.source=latest"]) == 2
    assert "labels alone (export.format=csv)" in capsys.readouterr().err
