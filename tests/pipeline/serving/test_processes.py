"""A server of several processes is one server: the same answers, limits and metrics, and one end of all."""

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from aiohttp import web

from pipeline.serving.connections import Connection, Connections, _Refused
from pipeline.serving.metrics import Counts, Metrics
from tests.pipeline.serving.conftest import SHARD, TOKEN
from tests.serving import ServerProcess, connected, fetch, metric, raw, served_by, wait_for
from tests.small_run import SmallRun

NUM = 3


def words(run: SmallRun, *more: str) -> list[str]:
    return [
        f"run_dir={run.folder}/run",
        "serve.port=0",
        "serve.source=run",
        f"serve.processes={NUM}",
        "serve.grace_s=0",
        *more,
    ]


def is_alive(process: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def several(run: SmallRun) -> Iterator[str]:
    """URL of a server of three processes that serves the joined run, at most three answers at once."""
    with ServerProcess(*words(run, "serve.max_connections=3")) as process:
        yield process.url()


def test_every_process_gives_the_same_bytes_as_one(several: str, joined: str) -> None:
    paths = (SHARD, "manifest.json", "labels/unlabeled-000000.parquet", "openapi.json")
    expected = {path: fetch(f"{joined}/{path}") for path in paths}
    for path in paths:
        for _ in range(NUM):  # each connection goes to the next process
            found = fetch(f"{several}/{path}")
            assert (found.status, found.content) == (200, expected[path].content)
            assert found.headers["ETag"] == expected[path].headers["ETag"]


def test_connections_are_spread_and_metrics_are_of_all(several: str) -> None:
    name = "noisy_student_serve_sent_bytes_total"
    before = metric(several, name)
    with ThreadPoolExecutor(3) as pool:
        contents = list(pool.map(lambda _: fetch(f"{several}/{SHARD}").content, range(3)))
    expected = before + sum(map(len, contents))
    wait_for(lambda: metric(several, name) >= expected)  # a client can have the last bytes before they are counted
    assert metric(several, name) == expected, "whichever process is asked"
    with ExitStack() as clients:
        for _ in range(5):
            clients.enter_context(connected(several))
        wait_for(lambda: metric(several, "noisy_student_serve_connections") == 6)


def test_the_limit_of_answers_is_that_of_all_processes_together() -> None:
    counts = Counts(2)
    one, other = Metrics(counts, 0), Metrics(counts, 1)
    one.set_answering(2)
    other.set_answering(1)
    other.count_answer("/healthz", 200)
    one.count_answer("/healthz", 200)
    assert one.num_answering == other.num_answering == 3
    assert b'noisy_student_serve_answers_total{route="/healthz",status="200"} 2.0' in one.text()


def test_the_limit_of_connections_is_that_of_all_processes_together() -> None:
    async def no_answer(_: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("nobody asks")

    async def accept_at_the_limit() -> None:
        counts = Counts(2)
        one, other = Metrics(counts, 0), Metrics(counts, 1)
        accept = Connections(web.Server(no_answer), 2, lambda _: False, one, {})
        other.set_connections(2)
        assert isinstance(accept(), _Refused), "and this process has none to close for it"
        other.set_connections(1)
        assert isinstance(accept(), Connection)
        assert one.num_connections == 2

    asyncio.run(accept_at_the_limit())


def test_security_holds_in_every_process(run: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with ServerProcess(*words(run, f"serve.token_file={tmp_path}/token")) as process:
        url = process.url()
        for _ in range(NUM):
            assert fetch(f"{url}/manifest.json").status == 401
            assert fetch(f"{url}/manifest.json", {"Authorization": f"Bearer {TOKEN}"}).status == 200
            assert b"TOKEN" not in b"".join(
                Path(f"/proc/{p}/cmdline").read_bytes() for p in served_by(process.process.pid)
            )


def test_other_names_of_this_machine_are_refused_by_every_process(several: str) -> None:
    for _ in range(NUM):
        assert fetch(f"{several}/manifest.json", {"Host": "evil.example"}).status == 421
        assert raw(several, b"nonsense\r\n\r\n").startswith(b"HTTP/1.0 400")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_all_processes(run: SmallRun, number: int) -> None:
    with ServerProcess(*words(run)) as process:
        process.url()
        served = served_by(process.process.pid)
        assert len(served) == NUM
        code, errors = process.end(number)
        assert (code, "Traceback" in errors) == (128 + number, False)
        assert not any(map(is_alive, served))


@pytest.mark.slow
def test_ctrl_c_while_the_processes_start_ends_without_an_error(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as process:
        wait_for(lambda: bool(served_by(process.process.pid)))
        for starting in served_by(process.process.pid):
            os.kill(starting, signal.SIGINT)
        code, errors = process.end(signal.SIGINT)
        assert (code, "Traceback" in errors) == (128 + signal.SIGINT, False)


@pytest.mark.slow
def test_processes_end_with_a_first_process_that_is_killed(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as process:
        process.url()
        served = served_by(process.process.pid)
        process.end(signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, served)))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_server_with_an_error(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as process:
        process.url()
        os.kill(served_by(process.process.pid)[0], signal.SIGKILL)
        _, errors = process.process.communicate(timeout=60)
    assert process.process.returncode == 2
    assert "exit code -9" in errors
    assert "serve.processes" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_servers_on_one_port_are_refused(run: SmallRun) -> None:
    with ServerProcess(*words(run)) as process:
        port = process.url().rpartition(":")[2]
        with ServerProcess(*words(run, f"serve.port={port}")) as second:
            _, errors = second.process.communicate(timeout=60)
        assert second.process.returncode != 0
        assert "ddress already in use" in errors
        assert fetch(f"http://127.0.0.1:{port}/healthz").status == 200
