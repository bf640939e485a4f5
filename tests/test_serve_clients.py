"""Clients that are slow, many, or go away, servers that stop, and files that change while they are served."""

from __future__ import annotations

import http.client
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from data import storage
from pipeline.export import export
from pipeline.layout import Layout
from pipeline.run import main
from pipeline.serve import open_catalog
from pipeline.serving import listening, sending
from pipeline.serving.catalog import Catalog
from pipeline.serving.exported import open_version
from pipeline.serving.joined import JoinedRun
from tests.conftest import WriteDigits, make_writer
from tests.s3_server import Fault, FaultyS3
from tests.serving import (
    ServerProcess,
    ask,
    connected,
    fetch,
    large_images,
    make_run,
    metric,
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
    """A run and an export of it whose shards have 20 MB."""
    run = make_run(tmp_path_factory.mktemp("large"), large_images(make_writer(digits), IMAGE_BYTES))
    export(run.config(export={"samples_per_shard": 50}), Layout(str(run.folder / "run")))
    yield run
    ray.shutdown()


def catalog(run: SmallRun, source: str = "run") -> Catalog:
    return open_catalog(run.config(serve={"source": source}), [Layout(str(run.folder / "run"))])


@pytest.fixture(params=["run", "latest"])
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def path_of(source: str) -> str:
    return SHARD if source == "run" else EXPORTED


def words(run: SmallRun, *more: str) -> list[str]:
    return [f"run_dir={run.folder}/run", "serve.port=0", *more]


def test_many_clients_at_once_get_the_same_bytes(run: SmallRun, source: str) -> None:
    with server_thread(catalog(run, source)) as url, ThreadPoolExecutor(16) as pool:
        contents = set(pool.map(lambda _: fetch(f"{url}/{path_of(source)}").content, range(16)))
    assert [len(content) > 50 * 0.9 * IMAGE_BYTES for content in contents] == [True]


def test_clients_that_read_nothing_cost_little_and_leave_nothing(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as server, ExitStack() as clients:
        url = server.url()
        whole = fetch(f"{url}/{SHARD}").content
        before = metric(url, "process_resident_memory_bytes")
        for _ in range(40):
            ask(clients.enter_context(connected(url, receive_buffer=4096)), f"{url}/{SHARD}")
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 40)
        assert fetch(f"{url}/{SHARD}").content == whole
        assert metric(url, "process_resident_memory_bytes") - before < 40 * 4e6
        files = Path(f"/proc/{server.process.pid}/fd")
        open_shards = [link for link in map(os.readlink, files.iterdir()) if link.endswith(".tar")]
        assert len(open_shards) == 40
        clients.close()
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 0)
        wait_for(lambda: not any(os.readlink(link).endswith(".tar") for link in files.iterdir()))


def test_a_client_that_stands_still_is_cut_off(run: SmallRun, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SEND_TIMEOUT_S", 0.3)
    with server_thread(catalog(run, source)) as url, connected(url, receive_buffer=4096) as client:
        ask(client, f"{url}/{path_of(source)}")
        wait_for(lambda: metric(url, "noisy_student_serve_connections") == 1)  # this question's own
        with pytest.raises(ConnectionResetError):
            while client.recv(1 << 20):
                pass


def test_beyond_the_limit_clients_are_told_to_come_again(run: SmallRun, source: str) -> None:
    with server_thread(catalog(run, source), max_connections=2) as url, ExitStack() as clients:
        for _ in range(2):
            ask(clients.enter_context(connected(url, receive_buffer=4096)), f"{url}/{path_of(source)}")
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 2)
        refused = fetch(f"{url}/manifest.json")
        assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
        assert fetch(f"{url}/healthz").status == 200
        clients.close()
        wait_for(lambda: fetch(f"{url}/manifest.json").status == 200)


def test_connections_are_limited_before_they_cost_anything(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_SPARE", 2)
    with server_thread(catalog(run), max_connections=1) as url, ExitStack() as idle:
        for _ in range(3):
            idle.enter_context(connected(url))
        wait_for(lambda: _is_closed(url))
        idle.close()
        wait_for(lambda: not _is_closed(url))


def _is_closed(url: str) -> bool:
    try:
        return fetch(f"{url}/healthz").status != 200
    except (ConnectionError, http.client.HTTPException):
        return True


def test_a_download_goes_on_after_a_kill_and_ends_before_the_server_does(run: SmallRun, source: str) -> None:
    with ServerProcess(*words(run, f"serve.source={source}")) as first:
        url = first.url()
        whole = fetch(f"{url}/{path_of(source)}")
        with connected(url) as client:
            ask(client, f"{url}/{path_of(source)}")
            got = _read_body(client, 3_000_000)
            first.process.kill()
    assert got == whole.content[: len(got)]
    with ServerProcess(*words(run, f"serve.source={source}")) as second, connected(url := second.url(), 4096) as client:
        etag = whole.headers["ETag"]
        ask(client, f"{url}/{path_of(source)}", f"Range: bytes={len(got)}-\r\nIf-Range: {etag}\r\n")
        got += _read_body(client, 1_000_000)
        second.process.send_signal(signal.SIGTERM)
        wait_for(lambda: _is_closed(url))  # no new clients
        while piece := client.recv(1 << 20):  # until the server ends the connection
            got += piece
        code, errors = second.end()
    assert got == whole.content
    assert code == 128 + signal.SIGTERM
    assert "stopped (SIGTERM)" in errors
    assert "Traceback" not in errors


def _read_body(client: object, number: int) -> bytes:
    """So many bytes, or some more, behind the headers."""
    content = b""
    while b"\r\n\r\n" not in content or len(content) < number:
        piece = client.recv(1 << 16)  # type: ignore[attr-defined]
        assert piece, "the server ended the connection"
        content += piece
    return content.partition(b"\r\n\r\n")[2]


def test_a_client_that_does_not_end_is_given_up_after_the_grace(run: SmallRun, source: str) -> None:
    more = words(run, f"serve.source={source}", "serve.grace_s=0.5")
    with ServerProcess(*more) as server, connected(url := server.url(), 4096) as client:
        ask(client, f"{url}/{path_of(source)}")
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 1)
        code, errors = server.end(signal.SIGINT)
    assert (code, "Traceback" in errors) == (128 + signal.SIGINT, False)


def test_a_shard_or_label_file_that_has_changed_is_not_sent(
    run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        content = path.read_bytes()
        for changed in (content[:-1], content + b"x", None):
            path.unlink() if changed is None else path.write_bytes(changed)
            with server_thread(served) as url:
                for what in (SHARD, other):
                    answer = fetch(f"{url}/{what}")
                    assert (answer.status, message in answer.json()["error"]) == (409, True)
                    assert str(run.folder) not in answer.json()["error"]
                assert fetch(f"{url}/shards/unlabeled-000001.tar").status == 200
            path.write_bytes(content)
        with server_thread(served) as url:
            assert fetch(f"{url}/{SHARD}").status == 200


def test_a_shard_that_is_cut_short_on_the_way_ends_the_connection(
    run: SmallRun, source: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "unlabeled/unlabeled-000000.tar" if source == "run" else "run/exports/v1/pseudo-000000.tar"
    path = run.folder / name
    content = path.read_bytes()
    try:
        with server_thread(catalog(run, source)) as url, connected(url, receive_buffer=4096) as client:
            ask(client, f"{url}/{path_of(source)}")
            got = _read_body(client, 100_000)
            os.truncate(path, 15_000_000)
            with pytest.raises(ConnectionResetError):
                while piece := client.recv(1 << 20):
                    got += piece
    finally:
        path.write_bytes(content)
    assert 100_000 < len(got) < 16_000_000
    assert path.name in capfd.readouterr().err


def test_files_of_an_export_that_are_gone_or_lead_out_are_not_sent(run: SmallRun, tmp_path: Path) -> None:
    served = catalog(run, "v1")
    secret = tmp_path / "secret"
    for name, path in (
        (EXPORTED, "pseudo-000000.tar"),
        ("labels/pseudo-000000.parquet", "labels/pseudo-000000.parquet"),
    ):
        file = run.folder / "run/exports/v1" / path
        content = file.read_bytes()
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
    with server_thread(served) as url:
        assert fetch(f"{url}/{EXPORTED}").status == 200


def test_a_corpus_and_an_export_in_an_object_store_are_served_as_local_ones(
    run: SmallRun, s3: FaultyS3, folder: str
) -> None:
    local, remote = catalog(run), f"{folder}/v1"
    assert isinstance(local, JoinedRun)
    for shard in local.overlay.shards[:1]:
        storage.write_bytes(f"{folder}/{shard.name}.tar", Path(shard.url).read_bytes())
    moved = (replace(local.overlay.shards[0], url=f"{folder}/unlabeled-000000.tar"), *local.overlay.shards[1:])
    version = run.folder / "run/exports/v1"
    for path in (path for path in version.rglob("*") if path.is_file()):
        storage.write_bytes(f"{remote}/{path.relative_to(version)}", path.read_bytes())
    span = {"Range": "bytes=1234567-7654321"}
    far: list[tuple[Catalog, Catalog, str]] = [
        (local, replace(local, overlay=replace(local.overlay, shards=moved)), SHARD),
        (catalog(run, "v1"), open_version(remote, []), EXPORTED),
    ]
    for near, distant, path in far:
        with server_thread(near) as here, server_thread(distant) as there:
            assert fetch(f"{here}/{path}").content == fetch(f"{there}/{path}").content
            s3.faults.append(Fault("cut", times=1, keep=100, matches=lambda method, path: method == "GET"))
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
def test_what_cannot_be_served_is_said_without_a_traceback(
    run: SmallRun, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["stage=serve", *words(run, *more)]) == 2
    assert message in capsys.readouterr().err


def test_an_address_in_use_and_labels_alone_are_said(
    tmp_path: Path, write_digits: WriteDigits, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, write_digits)
    with server_thread(catalog(run)) as url:
        assert main(["stage=serve", f"run_dir={tmp_path}/run", f"serve.port={url.rpartition(':')[2]}"]) == 2
    assert "address already in use" in capsys.readouterr().err
    export(run.config(export={"format": "csv"}), Layout(str(tmp_path / "run")))
    assert main(["stage=serve", f"run_dir={tmp_path}/run", "serve.source=latest"]) == 2
    assert "labels alone (export.format=csv)" in capsys.readouterr().err
