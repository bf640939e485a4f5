"""Files that were changed, removed or replaced by pipes and links after the server started are refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.serving.exported import ExportedVersion
from tests.pipeline.serving.conftest import LABELS, SHARD, TABLE
from tests.serving import catalog, fetch, server_thread
from tests.small_run import SmallRun


@pytest.fixture
def version(run: SmallRun) -> Iterator[tuple[ExportedVersion, Path]]:
    """An export and its folder, restored after the test."""
    served = catalog(run, "v1")
    folder = run.folder / "run/exports/v1"
    before = {path: (path.read_bytes(), path.stat()) for path in folder.rglob("*") if path.is_file()}
    yield served, folder
    for path, (content, state) in before.items():
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[:-1])
    elif how == "replaced":
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    elif how == "other":
        path.write_bytes(path.with_name("pseudo-000001.parquet").read_bytes())
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()


HOW = ["cut", "replaced", "other", "pipe", "gone"]


@pytest.mark.parametrize("how", HOW)
def test_a_label_table_other_than_the_committed_one_is_not_sent(
    version: tuple[ExportedVersion, Path], how: str
) -> None:
    served, folder = version
    damage(folder / TABLE, how)
    with server_thread(served) as url:
        for headers in ({}, {"Range": "bytes=0-9"}):
            answer = fetch(f"{url}/{TABLE}", headers)
            assert (answer.status, "pseudo-000000.parquet" in answer.json()["error"]) == (409, True)
        assert fetch(f"{url}/", {}).status == 409, "the page shows images by this table"
        assert fetch(f"{url}/labels/pseudo-000001.parquet").status == 200
        assert fetch(f"{url}/healthz").status == 200


def test_the_etag_of_a_label_table_is_its_sha256(version: tuple[ExportedVersion, Path]) -> None:
    served, folder = version
    with server_thread(served) as url:
        answer = fetch(f"{url}/{TABLE}")
        assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    before = replace(served, tables={})  # of an export whose record does not have them
    with server_thread(before) as url:
        assert fetch(f"{url}/{TABLE}").content == (folder / TABLE).read_bytes()


@pytest.mark.parametrize("how", ["cut", "replaced", "pipe", "folder", "gone"])
def test_a_damaged_or_replaced_shard_is_not_sent_and_does_not_block(
    version: tuple[ExportedVersion, Path], how: str
) -> None:
    served, folder = version
    with server_thread(served) as url:
        assert fetch(f"{url}/").status == 200
        damage(folder / "pseudo-000000.tar", how)
        for path in ("shards/pseudo-000000.tar", "pseudo-000000.tar", "samples/0"):
            assert fetch(f"{url}/{path}").status == 409, path
        assert fetch(f"{url}/healthz").status == 200


def test_a_pipe_that_replaces_a_file_after_the_check_does_not_block(
    version: tuple[ExportedVersion, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, folder = version
    monkeypatch.setattr("pipeline.serving.exported.check_file", lambda *_: None)
    damage(folder / "pseudo-000000.tar", "pipe")
    damage(folder / TABLE, "pipe")
    with server_thread(served) as url:
        for path in ("shards/pseudo-000000.tar", TABLE):
            answer = fetch(f"{url}/{path}")
            assert (answer.status, "is not the file" in answer.json()["error"]) == (409, True)


@pytest.mark.parametrize("which", ["shard", "labels", "copies"])
def test_a_pipe_among_a_runs_files_does_not_block(run: SmallRun, which: str) -> None:
    served = catalog(run)
    files = dict(zip(("labels", "copies"), served.overlay.files(0), strict=True))
    path = Path(files.get(which, served.overlay.shards[0].url))
    with server_thread(served) as url:
        assert fetch(f"{url}/").status == 200
    content, before = path.read_bytes(), path.stat()
    path.unlink()
    os.mkfifo(path)
    try:
        with server_thread(served) as url:
            assert fetch(f"{url}/{SHARD}").status == fetch(f"{url}/{LABELS}").status == 409
            assert fetch(f"{url}/manifest.json").status == (200 if which == "shard" else 409)
            assert fetch(f"{url}/samples/0").status == 409
            assert fetch(f"{url}/healthz").status == 200
    finally:
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_manifest_that_names_paths_outside_the_export_is_refused(
    version: tuple[ExportedVersion, Path], run: SmallRun
) -> None:
    _, folder = version
    whole = json.loads((folder / "manifest.json").read_text())
    for name in ("../../../config.yaml", "/etc/passwd", "..\\x.tar", "a\nb.tar"):
        changed = whole | {"shards": [whole["shards"][0] | {"name": name}]}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"manifest\.json: it names"):
            catalog(run, "v1")
    (folder.parent / "latest").write_text("../../x")
    try:
        with pytest.raises(ValueError, match="latest: it names"):
            catalog(run, "latest")
    finally:
        (folder.parent / "latest").write_text("v1\n")
