"""The nginx configuration in docs/ serves an export to who has the token, and nothing else. Needs Debian's nginx-light."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from noisy_student import PseudoLabels
from tests.pipeline.serving.conftest import TOKEN
from tests.serving import fetch, layout, raw, wait_for
from tests.small_run import SmallRun

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONFIG = Path(__file__).parents[3] / "docs/nginx.conf"
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture(scope="module")
def export(run: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the export, which nginx's own user may read."""
    folder = tmp_path_factory.mktemp("nginx") / "v1"
    shutil.copytree(Path(layout(run).exports) / "v1", folder)
    (folder / ".tmp-1-pseudo-000009.tar").write_text("half")
    (folder / "outside").symlink_to(Path(layout(run).run_dir) / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def url(export: Path) -> Iterator[str]:
    assert NGINX is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = CONFIG.read_text()
    for before, after in (("8081", str(port)), ("/data/run/exports/v1", str(export)), ("TOKEN", TOKEN)):
        assert before in text
        text = text.replace(before, after)
    home = export.parent
    user = "user root; " if os.geteuid() == 0 else ""
    (home / "nginx.conf").write_text(f"{user}{text}")
    own = f"daemon off; pid {home}/pid; error_log {home}/error.log;"
    with subprocess.Popen([NGINX, "-p", str(home), "-c", str(home / "nginx.conf"), "-g", own]) as process:
        try:
            wait_for(lambda: listens(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_exports_files_are_served_whole_and_in_ranges(url: str, export: Path) -> None:
    for name in ("pseudo-000000.tar", "labels/pseudo-000000.parquet", "wids.json", "manifest.json"):
        content = (export / name).read_bytes()
        assert fetch(f"{url}/{name}", WITH_TOKEN).content == content
        part = fetch(f"{url}/{name}", {**WITH_TOKEN, "Range": "bytes=10-19"})
        assert (part.status, part.content) == (206, content[10:20])


def test_pseudo_labels_reads_the_export_through_nginx(url: str, export: Path) -> None:
    def read(source: str, token: str | None = None) -> list[tuple[str, bytes, int]]:
        samples = PseudoLabels(source, token=token).dataset(as_dict=True)
        return [(sample["key"], sample["image"].tobytes(), sample["label"]) for sample in samples]

    assert read(url, token=TOKEN) == read(str(export))


def test_nothing_is_served_without_the_token(url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for name in ("", "pseudo-000000.tar", "labels/pseudo-000000.parquet", "manifest.json", "nothing"):
            assert fetch(f"{url}/{name}", headers).status == 401


def test_only_the_exports_own_files_are_served(url: str) -> None:
    for name in ("", "labels/", "done.json", "started.json", ".tmp-1-pseudo-000009.tar", "nothing", "outside"):
        assert fetch(f"{url}/{name}", WITH_TOKEN).status in (403, 404), name
    request = (
        f"GET /../nginx.conf HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
    )
    assert b"Bearer" not in raw(url, request.encode())


def test_nothing_is_written_and_other_hosts_are_refused(url: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert fetch(f"{url}/manifest.json", WITH_TOKEN, method).status in (403, 405)
    assert fetch(f"{url}/manifest.json", {**WITH_TOKEN, "Host": "evil.example"}).status == 421
