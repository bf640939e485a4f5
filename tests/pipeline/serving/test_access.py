"""What strangers can do to a server: nothing but ask, under its own names, with its token, and without holding up others."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import logging
import os
import random
import re
import string
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.labels import exclusions as exclude
from data.labels.overlay import RowFilter
from pipeline.serving.blocking_pool import AsyncCache, BlockingPool, BusyError
from pipeline.serving.credentials import has_token, names_loopback
from pipeline.serving.exported import ExportedVersion
from pipeline.serving.joined import JoinedRun
from tests.conftest import make_writer
from tests.data.labels.test_pseudo_labels import export_here
from tests.serving import catalog, connected, fetch, layout, make_run, metric, raw, server_thread, wait_for
from tests.small_run import SmallRun

TOKEN = "right-token"
SHARD, LABELS = "shards/unlabeled-000000.tar", "labels/unlabeled-000000.parquet"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: tuple[np.ndarray, np.ndarray]) -> SmallRun:
    run = make_run(tmp_path_factory.mktemp("access"), make_writer(digits))
    export_here(run.config(export={"samples_per_shard": 20}), layout(run))
    return run


@pytest.fixture(scope="module")
def joined(run: SmallRun) -> Iterator[str]:
    with server_thread(catalog(run)) as url:
        yield url


@pytest.fixture(scope="module")
def locked(run: SmallRun) -> Iterator[str]:
    with server_thread(catalog(run, "v1"), token=TOKEN) as url:
        yield url


def basic(password: str, user: str = "me") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode(), "Accept": "text/html"}


# --- names


LOOPBACK = [
    "localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "127.1.2.3:80", "[::1]", "[::1]:8080",
]  # fmt: skip
OTHERS = [
    "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]", "0.0.0.0", "[::]",
    "localhost@evil.example", "evil.example#localhost", "local host", "localhost:x", "localhost:999999", "[localhost]", "", "::1",
    "localhost.", "localhost,evil.example",
]  # fmt: skip


def test_names_of_this_machine_are_told_from_others() -> None:
    assert [name for name in LOOPBACK if not names_loopback(name)] == []
    assert [name for name in OTHERS if names_loopback(name)] == []


@pytest.mark.parametrize(
    "path", ["/", "/manifest.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/metrics", "/openapi.json", "/x"]
)
def test_without_a_token_another_name_gets_nothing(joined: str, path: str) -> None:
    for name in ("evil.example", "127.0.0.1.evil.example:80", "10.0.0.1"):
        answer = fetch(joined + path, {"Host": name})
        assert (answer.status, answer.json()["error"].startswith("this server answers as localhost")) == (421, True)
        assert b"unlabeled" not in answer.content
    for name in ("localhost:1234", "127.0.0.1", "[::1]:80"):
        assert fetch(joined + path, {"Host": name}).status != 421
    assert fetch(f"{joined}/healthz", {"Host": "evil.example"}).status == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET http://evil.example/manifest.json HTTP/1.1\r\nHost: localhost",
        b"GET /manifest.json HTTP/1.1\r\nHost: localhost\r\nHost: evil.example",
        b"GET /manifest.json HTTP/1.1\r\nHost: evil.example\r\nHost: localhost",
        b"GET /manifest.json HTTP/1.1\r\nHost: localhost\r\nX: y\r\nhost: evil.example",
        b"GET /manifest.json HTTP/1.1\r\nHost:\tevil.example",
    ],
)
def test_no_form_of_a_request_smuggles_a_name(joined: str, head: bytes) -> None:
    assert raw(joined, head + b"\r\nConnection: close\r\n\r\n").split(b" ")[1] in (b"421", b"400")


def test_a_probe_without_a_name_and_everyone_of_an_open_server_is_answered(run: SmallRun, joined: str) -> None:
    assert raw(joined, b"GET /manifest.json HTTP/1.0\r\n\r\n").split(b" ")[1] == b"200"
    for settings in ({"open_to_all": True}, {"token": TOKEN}):
        with server_thread(catalog(run), **settings) as url:
            answer = fetch(f"{url}/manifest.json", {"Host": "labels.example", "Authorization": f"Bearer {TOKEN}"})
            assert answer.status == 200


# --- the token


def test_a_browser_is_asked_for_the_token_and_gets_page_and_images_with_it(locked: str) -> None:
    asked = fetch(f"{locked}/", {"Accept": "text/html,*/*;q=0.8"})
    assert asked.status == 401
    assert "Basic realm" in str(
        raw(locked, b"GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\nConnection: close\r\n\r\n")
    )
    program = raw(locked, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert b"Basic realm" not in program
    assert b"Bearer realm" in program
    page = fetch(f"{locked}/", basic(TOKEN))
    assert page.status == 200
    number = page.content.count(b'src="samples/')
    assert number > 4
    images = [fetch(f"{locked}/samples/{n}", basic(TOKEN)) for n in range(number)]
    assert {(image.status, image.headers["Content-Type"]) for image in images} == {(200, "image/png")}
    assert fetch(f"{locked}/samples/0").status == 401
    for path in ("manifest.json", "openapi.json", "metrics"):
        assert fetch(f"{locked}/{path}", basic(TOKEN)).status == 200
    assert TOKEN.encode() not in page.content


def test_other_passwords_and_forms_open_nothing(locked: str) -> None:
    values = (
        basic(one, user)["Authorization"]
        for one, user in (("wrong", "me"), ("", ""), ("x", TOKEN), (f"{TOKEN} ", "me"))
    )
    for given in (*values, f"Basic {TOKEN}", "Basic", "Basic !!!", f"Digest {TOKEN}"):
        assert fetch(f"{locked}/manifest.json", {"Authorization": given}).status == 401
    assert fetch(f"{locked}/manifest.json", {"Cookie": f"token={TOKEN}"}).status == 401
    assert fetch(f"{locked}/manifest.json?token={TOKEN}").status == 401
    assert has_token(basic("a:b", "")["Authorization"], "a:b"), "a token may have a colon"
    assert not has_token(basic("b", "a")["Authorization"], "a:b")


def blocks(page: str) -> dict[str, str]:
    """Consumer → code, as the page shows it."""
    return {name: html.unescape(code) for name, code in re.findall(r"<h3>(.*?)</h3><pre>(.*?)</pre>", page, re.DOTALL)}


def test_the_examples_of_a_server_with_a_token_work_as_they_stand(
    locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", TOKEN)
    monkeypatch.setattr("data.storage.web_tokens._given", {})
    shown = blocks(fetch(f"{locked}/", basic(TOKEN)).content.decode())
    assert set(shown) == {"curl", "PseudoLabels", "webdataset", "Others"}
    assert not [code for code in shown.values() if TOKEN in code]
    subprocess.run(["sh", "-ec", shown["curl"].replace("curl ", "curl --fail --silent --show-error ")], cwd=tmp_path, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    whole = fetch(f"{locked}/shards/pseudo-000000.tar", basic(TOKEN)).content
    assert (tmp_path / "pseudo-000000.tar").read_bytes() == whole
    number = fetch(f"{locked}/manifest.json", basic(TOKEN)).json()["num_samples"]
    names: dict[str, Any] = {}
    exec(shown["PseudoLabels"], names)
    assert len(names["labels"]) == number
    exec(shown["webdataset"], names)
    assert len(list(names["dataset"])) == number


# --- what takes long


def test_cheap_requests_are_answered_while_every_scan_is_stuck(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun, lock = threading.Event(), [0], threading.Lock()
    entries = JoinedRun.entries

    def slow(self: JoinedRun, keep: RowFilter) -> Any:
        if keep.min_confidence:
            with lock:
                begun[0] += 1
            assert go_on.wait(60)
        return entries(self, keep)

    monkeypatch.setattr(JoinedRun, "entries", slow)
    with server_thread(catalog(run)) as url, ThreadPoolExecutor(40) as pool:
        try:
            filters = [f"{url}/manifest.json?min_confidence=0.{number}" for number in range(10, 40)]
            asked = [pool.submit(fetch, one) for one in filters]
            wait_for(lambda: sum(one.done() for one in asked) >= 20)
            refused = [one.result() for one in asked if one.done()]
            assert {answer.status for answer in refused} == {503}
            assert {answer.headers["Retry-After"] for answer in refused} == {"5"}
            assert begun[0] == 2, "two at once"
            assert fetch(f"{url}/healthz").status == fetch(f"{url}/metrics").status == 200
            for path in (SHARD, f"{SHARD}?min_confidence=0.99", LABELS, "openapi.json"):
                assert fetch(f"{url}/{path}").status == 200
        finally:
            go_on.set()
        statuses = [one.result().status for one in asked]
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(200) == 10, "two, and eight that waited"


def test_a_filter_is_scanned_once_under_whatever_name_and_spelling(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[RowFilter] = []
    entries = JoinedRun.entries

    def noted(self: JoinedRun, keep: RowFilter) -> Any:
        scanned.append(keep)
        return entries(self, keep)

    monkeypatch.setattr(JoinedRun, "entries", noted)
    with server_thread(catalog(run), open_to_all=True) as url:
        for number in range(12):
            answer = fetch(f"{url}/", {"Host": f"host{number}.example"})
            assert f"http://host{number}.example/shards/".encode() in answer.content
        for query in (
            "classes=3,7&min_confidence=0.5",
            "min_confidence=0.50&classes=7,3,3&selected=true",
            "classes=7,3&min_confidence=5e-1",
        ):
            assert fetch(f"{url}/manifest.json?{query}", {"Host": "x.example"}).status == 200
        for number in range(20):  # do not push out what all ask for
            fetch(f"{url}/manifest.json?min_confidence=0.{number + 10}")
        assert fetch(f"{url}/manifest.json").status == fetch(f"{url}/").status == 200
    assert len(scanned) == 2 + 20
    assert scanned.count(RowFilter()) == 1


def test_pages_of_different_names_are_told_apart_by_their_tags(run: SmallRun) -> None:
    with server_thread(catalog(run), open_to_all=True) as url:
        first, second = (fetch(f"{url}/", {"Host": name}) for name in ("a.example", "b.example"))
        assert first.headers["ETag"] != second.headers["ETag"]
        again = fetch(f"{url}/", {"Host": "a.example", "If-None-Match": first.headers["ETag"]})
    assert again.status == 304


class _Counted(frozenset[str]):
    """Lines that count how often all of them are gone through."""

    passes = 0

    def __iter__(self) -> Iterator[str]:
        _Counted.passes += 1
        return super().__iter__()


def test_excluded_keys_are_gone_through_once_and_not_by_requests(run: SmallRun) -> None:
    served = catalog(run)
    lines = _Counted(f"key{number}" for number in range(1000)) | {"unlabeled-000001/00055"}
    many = replace(served, overlay=replace(served.overlay, excluded=_Counted(lines)))
    first = [many.shard(name, RowFilter()) for name in ("unlabeled-000000", "unlabeled-000001")]
    fewer = len(many.overlay.wanted(1, RowFilter(False)))
    assert fewer == len(served.overlay.wanted(1, RowFilter(False))) - 1
    before = _Counted.passes
    for _ in range(20):
        assert [many.shard(name, RowFilter()).etag for name in ("unlabeled-000000", "unlabeled-000001")] == [
            one.etag for one in first
        ]
        many.overlay.wanted(0, RowFilter())
    assert _Counted.passes == before
    assert first[0].etag != served.shard("unlabeled-000000", RowFilter()).etag
    other = replace(served.overlay, excluded=frozenset(lines))
    assert other.identity(0, RowFilter()) == many.overlay.identity(0, RowFilter()), "the same lines, the same tag"


def test_a_key_is_excluded_as_its_list_says() -> None:
    source = random.Random(0)
    for _ in range(200):
        keys = [source.choice("abc") + source.choice(["", "/d", "/1"]) for _ in range(6)]
        lines = frozenset(source.choice(["", "s/", "t/"]) + source.choice(keys) for _ in range(4))
        expected = [key in exclude.keys_in(lines, "s") for key in keys]
        assert exclude.is_excluded(lines, "s", keys).tolist() == expected


def test_what_nobody_waits_for_any_more_is_not_made_and_does_not_count() -> None:
    async def go() -> None:
        pool, go_on, made = BlockingPool(1, 1), threading.Event(), list[str]()
        cache = AsyncCache(pool, 2)

        def make(name: str) -> Callable[[], str]:
            def made_now() -> str:
                assert go_on.wait(60)
                made.append(name)
                return name

            return made_now

        first = asyncio.create_task(cache.get("first", make("first")))
        second = asyncio.create_task(cache.get("second", make("second")))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await cache.get("third", make("third"))
        second.cancel()
        with suppress(asyncio.CancelledError):
            await second
        await asyncio.sleep(0.05)
        third = asyncio.create_task(cache.get("third", make("third")))
        too = asyncio.create_task(cache.get("third", make("never")))
        await asyncio.sleep(0)
        third.cancel()
        go_on.set()
        assert await first == "first"
        assert await too == "third", "another client still waits for it"
        assert await cache.get("second", make("second")) == "second", "and it can be made again"
        assert made == ["first", "third", "second"]
        pool.close()

    asyncio.run(go())


# --- files that are not what they were


@pytest.fixture
def version(run: SmallRun) -> Iterator[tuple[ExportedVersion, Path]]:
    """An export, whole again afterwards."""
    served = catalog(run, "v1")
    folder = run.folder / "run/exports/v1"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    yield served, folder
    for path, content in before.items():
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)


TABLE = "labels/pseudo-000000.parquet"


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
def test_a_label_table_that_is_not_the_committed_one_is_not_sent(
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


def test_a_label_table_has_the_digest_of_its_bytes_as_tag(version: tuple[ExportedVersion, Path]) -> None:
    served, folder = version
    with server_thread(served) as url:
        answer = fetch(f"{url}/{TABLE}")
        assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    before = replace(served, tables={})  # of an export whose record does not have them
    with server_thread(before) as url:
        assert fetch(f"{url}/{TABLE}").content == (folder / TABLE).read_bytes()


@pytest.mark.parametrize("how", ["cut", "pipe", "folder", "gone"])
def test_a_shard_that_is_no_file_is_not_waited_for(version: tuple[ExportedVersion, Path], how: str) -> None:
    served, folder = version
    with server_thread(served) as url:
        assert fetch(f"{url}/").status == 200
        damage(folder / "pseudo-000000.tar", how)
        for path in ("shards/pseudo-000000.tar", "pseudo-000000.tar", "samples/0"):
            assert fetch(f"{url}/{path}").status == 409, path
        assert fetch(f"{url}/healthz").status == 200


def test_a_pipe_that_takes_the_place_of_a_file_after_the_check_is_not_waited_for(
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
def test_a_pipe_among_a_runs_files_is_not_waited_for(run: SmallRun, which: str) -> None:
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


def test_an_export_of_others_that_names_paths_is_not_served(
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


# --- conditions on documents


def test_documents_take_conditions_and_codings_as_files_do(joined: str) -> None:
    for path in ("/", "/manifest.json", "/openapi.json"):
        plain, packed = fetch(joined + path), fetch(joined + path, {"Accept-Encoding": "gzip"})
        refused = fetch(joined + path, {"Accept-Encoding": "gzip;q=0, identity"})
        assert ("Content-Encoding" in refused.headers, refused.content) == (False, plain.content)
        etag = plain.headers["ETag"]
        assert packed.headers["ETag"] != etag
        for tags, status in ((etag, 200), ("*", 200), (f"W/{etag}", 412), ('"other"', 412)):
            assert fetch(joined + path, {"If-Match": tags}).status == status
        assert fetch(joined + path, {"If-None-Match": f'"x", W/{etag}'}).status == 304


SOME_PATHS = ["/", "/manifest.json", "/openapi.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/healthz", "/nothing"]


@pytest.mark.parametrize("path", SOME_PATHS)
def test_head_has_the_headers_of_get_and_no_content(joined: str, path: str) -> None:
    for headers in ({}, {"Accept-Encoding": "gzip"}, {"If-None-Match": "*"}, {"If-Match": '"other"'}):
        got, head = fetch(joined + path, headers), fetch(joined + path, headers, method="HEAD")
        assert (head.status, head.content) == (got.status, b"")
        same = {"Date": ""} if got.status == 200 else {"Date": "", "Content-Length": ""}  # an error names the method
        assert {**head.headers, **same} == {**got.headers, **same}
    assert fetch(joined + path, {"Range": "bytes=0-1"}, method="HEAD").headers.get("Content-Range") is None


def test_weak_tags_do_not_let_a_range_go_on(joined: str) -> None:
    whole = fetch(f"{joined}/{SHARD}")
    etag = whole.headers["ETag"]
    part = {"Range": "bytes=5-9"}
    assert fetch(f"{joined}/{SHARD}", part | {"If-Range": f"W/{etag}"}).status == 200
    assert fetch(f"{joined}/{SHARD}", part | {"If-Match": f"W/{etag}"}).status == 412
    assert fetch(f"{joined}/{SHARD}", part | {"If-Range": etag}).content == whole.content[5:10]
    assert fetch(f"{joined}/{SHARD}", {"Range": f"bytes=5-{'9' * 3000}"}).content == whole.content[5:]


# --- requests that are none


MALFORMED = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n", b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET http://localhost:99999999/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\nx",
    b"GET / HTTP/1.1\r\nTransfer-Encoding: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /%zz%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n\x81\x05hello",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\n\r\n",
    b"GET /manifest.json?%ff=%00&&==&classes HTTP/1.1\r\nHost: localhost\r\n\r\n", b"A" * 20_000,
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
]  # fmt: skip


def rest(url: str, request: bytes) -> bytes:
    """What comes back when the client says no more."""
    with connected(url) as client, suppress(ConnectionError):
        client.sendall(request)
        client.shutdown(1)
        found = b""
        while piece := client.recv(1 << 16):
            found += piece
        return found
    return b""


def test_malformed_requests_are_refused_without_a_traceback_and_without_repeating_them(
    locked: str, joined: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
    with caplog.at_level(logging.INFO):
        for url in (joined, locked):
            for request in MALFORMED:
                head, _, tail = request.partition(b"\r\n")
                for sent in (request, head + b"\r\n" + secret + tail):
                    answer = rest(url, sent)
                    assert TOKEN.encode() not in answer
                    assert not answer or answer.split(b" ")[1][:1] in (b"1", b"2", b"4"), (sent, answer)
        wait_for(lambda: metric(joined, "noisy_student_serve_answering") == 0)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed + caplog.text
    assert TOKEN not in printed + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_bug_still_leaves_its_traceback(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(JoinedRun, "shard", lambda *_: 1 / 0)
    with server_thread(catalog(run)) as url:
        assert fetch(f"{url}/{SHARD}", {"Authorization": f"Bearer {TOKEN}"}).status == 500
    assert "ZeroDivisionError" in caplog.text
    assert TOKEN not in caplog.text


def test_a_name_in_the_log_is_one_line(
    run: SmallRun, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(JoinedRun, "shard", broken)
    with server_thread(catalog(run)) as url:
        assert fetch(f"{url}/shards/a%0aserve:%20forged%1b[2J.tar").status == 502
    assert capfd.readouterr().err.splitlines() == ["serve: /shards/a%0aserve:%20forged%1b[2J.tar: disk"]


PATHS = [
    "/", "/manifest.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/openapi.json", "/metrics", "/healthz", "/classes.txt",
    "/README.md", "/shards/pseudo-000000.tar", "/labels/pseudo-000000.parquet", "/pseudo-000000.tar", "/wids.json",
]  # fmt: skip
PIECES = [
    "..", "%2e%2e", "/", "%2f", "%5c", "\\", "%00", "%0a", "shards", "labels", "samples", "config.yaml", "done.json", ".tar",
    ".parquet", "gen-1", "é", "%ff", "~", ";", ":", "@", "*", "unlabeled-000000", "pseudo-000000", "index", "etc/passwd",
]  # fmt: skip
NAMES = [
    "Range", "If-Range", "If-Match", "If-None-Match", "Accept-Encoding", "Accept", "Host", "Authorization", "Connection",
    "X-Forwarded-Host", "Cookie", "If-Modified-Since", "Expect", "Transfer-Encoding", "Content-Length", "Content-Encoding",
    "Origin", "Referer", "TE", "Upgrade",
]  # fmt: skip
VALUES = [
    "bytes=0-9", "bytes=-5", "bytes=5-1", "bytes=0-1,2-3", "bytes=99999999999999999999-", "bytes=-0", "*", "W/*", '"x"', 'W/"x"',
    "gzip", "gzip;q=0", "*;q=0.5", "localhost", "evil.example", "127.0.0.1", "[::1]", "Bearer x", "Basic eA==", "Basic ?",
    "close", "keep-alive", "upgrade", "0", "5", "chunked", "100-continue", "text/html", "", " ", "\x7f", "é", ",,,", ";;;",
    "=" * 50,
]  # fmt: skip
QUERIES = [
    "min_confidence=0.5", "min_confidence=-1", "min_confidence=1e999", "min_confidence=nan", "classes=3", "classes=3,,4",
    "classes=-1", "classes=٣", "classes=99999999999999999999", "selected=false", "selected=maybe", "=", "&&", "a=%ff",
    "classes=%00", "x", "min_confidence=0_5",
]  # fmt: skip


STATUSES = [str(n).encode() for n in (100, 200, 206, 304, 400, 401, 404, 405, 412, 413, 416, 417, 421)]


def request_of(source: random.Random) -> bytes:
    """Some request: mostly well-formed, of parts that matter."""
    path = source.choice(PATHS)
    if source.random() < 0.4:
        path = "/" + "".join(
            source.choice([*PIECES, source.choice(string.printable)]) for _ in range(source.randrange(1, 6))
        )
    if source.random() < 0.4:
        path += "?" + "&".join(source.choice(QUERIES) for _ in range(source.randrange(1, 4)))
    lines = [
        f"{source.choice(['GET', 'GET', 'GET', 'HEAD', 'POST', 'OPTIONS', 'PUT', 'X'])} {path} HTTP/1.{source.choice('11110')}"
    ]
    lines += [f"Host: {source.choice(['localhost', '127.0.0.1:80', 'evil.example'])}"] if source.random() < 0.9 else []
    lines += [f"{source.choice(NAMES)}: {source.choice(VALUES)}" for _ in range(source.randrange(4))]
    request = bytearray("\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass"))
    if source.random() < 0.1:
        request[source.randrange(len(request))] = source.randrange(256)
    return bytes(request)


@pytest.mark.parametrize("kind", ["run", "v1"])
def test_no_request_is_a_server_error_or_a_way_to_another_file(
    run: SmallRun, kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(7)
    private = [
        path for name in ("config.yaml", "done.json", "quarantine.parquet") for path in (run.folder / "run").rglob(name)
    ]
    secrets = [path.read_bytes()[:40] for path in private]
    with server_thread(catalog(run, kind)) as url, ThreadPoolExecutor(8) as pool:
        requests = [request_of(source) for _ in range(500)]
        for request, answer in zip(requests, pool.map(lambda one: rest(url, one), requests), strict=True):
            assert not answer or answer.split(b" ")[1] in STATUSES, (request, answer[:300])
            assert not [one for one in secrets if one in answer], request
        wait_for(lambda: metric(url, "noisy_student_serve_answering") == 0)
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
