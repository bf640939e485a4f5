"""The server sends what an export would contain, any range of it, only to authorized clients, and nothing else."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.images.decode import decode
from data.labels.overlay import RowFilter
from data.settings import UsageError
from data.shards.image_reader import ImageReader
from data.shards.split import open_split
from data.storage.web_tokens import TOKEN_VARIABLE
from pipeline.core.command import parse_command
from pipeline.serving.blocking_pool import Pools
from pipeline.serving.credentials import SERVER_TOKEN_VARIABLE, check_host, read_token
from pipeline.serving.filters import PARAMETERS
from pipeline.serving.handlers import Handlers
from pipeline.serving.metrics import Metrics
from teacher.selection.stage import select
from tests.conftest import DIGIT_NAMES, make_writer
from tests.data.labels.test_joined_tar import samples
from tests.pipeline.export.test_export import with_teacher
from tests.serving import catalog, fetch, layout, raw, server_thread, wait_for
from tests.small_run import SmallRun

SHARDS = ["unlabeled-000000", "unlabeled-000001", "unlabeled-000002"]


@pytest.fixture(scope="module")
def exported(run: SmallRun) -> Iterator[str]:
    with server_thread(catalog(run, "latest")) as url:
        yield url


def test_a_joined_run_has_every_selected_image_once_as_its_manifest_says(run: SmallRun, joined: str) -> None:
    manifest = fetch(f"{joined}/manifest.json").json()
    assert {name: manifest[name] for name in ("format", "version", "kind", "generation", "class_names")} == {
        "format": "noisy-student-pseudo-labels", "version": 1, "kind": "joined", "generation": 1, "class_names": DIGIT_NAMES,
    }  # fmt: skip
    assert [shard["name"] for shard in manifest["shards"]] == SHARDS
    overlay = catalog(run).overlay
    for position, shard in enumerate(manifest["shards"]):
        wanted = overlay.rows(position, RowFilter())
        found = samples(fetch(f"{joined}/{shard['url']}").content)
        assert len(found) == shard["num_samples"] == len(wanted) > 0
        sources = [json.loads(members["json"])["source"]["ordinal"] for members in found.values()]
        assert sources == wanted.labels.column("ordinal").to_pylist()
        table = pq.read_table(io.BytesIO(fetch(f"{joined}/{shard['labels_url']}").content))
        assert table.column("__key__").to_pylist() == list(found)
        assert table.column("label").to_pylist() == [int(members["cls"]) for members in found.values()]
        assert table.column("source_ordinal").to_pylist() == sources
    assert manifest["num_samples"] == sum(shard["num_samples"] for shard in manifest["shards"])


def test_manifest_and_shards_have_only_rows_that_match_the_filter(joined: str) -> None:
    everything = fetch(f"{joined}/manifest.json?selected=false").json()
    assert [shard["num_samples"] for shard in everything["shards"]] == [49, 49, 19]  # one of each is quarantined
    query = "?classes=7,3&selected=false&min_confidence=0.60"
    manifest = fetch(f"{joined}/manifest.json{query}").json()
    assert 0 < manifest["num_samples"] < 117
    for shard in manifest["shards"]:
        assert shard["url"] == f"shards/{shard['name']}.tar?min_confidence=0.6&classes=3,7&selected=false"
        said = [json.loads(m["json"]) for m in samples(fetch(f"{joined}/{shard['url']}").content).values()]
        assert len(said) == shard["num_samples"]
        assert all(one["label"] in (3, 7) and one["confidence"] >= 0.6 for one in said)
        table = pq.read_table(io.BytesIO(fetch(f"{joined}/{shard['labels_url']}").content))
        assert table.column("source_key").to_pylist() == [one["source"]["key"] for one in said]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("min_confidence=1.5", "number from 0 to 1"),
        ("min_confidence=nan", "number from 0 to 1"),
        ("classes=", "class numbers from 0 to 9"),
        ("classes=3,10", "class numbers from 0 to 9"),
        ("classes=3&classes=4", "given twice"),
        ("selected=yes", "true or false"),
        ("min_confidense=0.5", "did you mean 'min_confidence'"),
    ],
)
@pytest.mark.parametrize("path", ["manifest.json", f"shards/{SHARDS[0]}.tar", f"labels/{SHARDS[0]}.parquet"])
def test_an_invalid_parameter_is_refused_with_what_was_expected(
    joined: str, path: str, query: str, expected: str
) -> None:
    answer = fetch(f"{joined}/{path}?{query}")
    assert answer.status == 400
    assert expected in answer.json()["error"]


def test_an_export_is_sent_unchanged_and_unfiltered(run: SmallRun, exported: str) -> None:
    folder = run.folder / "run/exports/v1"
    manifest = fetch(f"{exported}/manifest.json").json()
    assert manifest["kind"] == "export"
    assert len(manifest["shards"]) > 1
    for shard in manifest["shards"]:
        content = fetch(f"{exported}/{shard['url']}").content
        assert content == (folder / f"{shard['name']}.tar").read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
        labels = fetch(f"{exported}/{shard['labels_url']}").content
        assert labels == (folder / f"labels/{shard['name']}.parquet").read_bytes()
        assert pq.read_table(io.BytesIO(labels)).num_rows == shard["num_samples"]
        refused = fetch(f"{exported}/{shard['url']}?min_confidence=0.5")
        assert (refused.status, "without a filter" in refused.json()["error"]) == (400, True)
    for name in (
        "wids.json",
        "_info.json",
        "sizes.json",
        "classes.txt",
        "README.md",
        "SHA256SUMS",
        "pseudo-000000.tar",
    ):
        assert fetch(f"{exported}/{name}").content == (folder / name).read_bytes()
    for name in ("done.json", "started.json", "labels", "index/pseudo-000000.parquet"):
        assert fetch(f"{exported}/{name}").status == 404


@pytest.mark.parametrize("kind", ["joined", "exported"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_range_equals_that_part_of_the_whole_file(
    kind: str, request: pytest.FixtureRequest, data: st.DataObject
) -> None:
    url = request.getfixturevalue(kind)
    shard = fetch(f"{url}/manifest.json").json()["shards"][0]["url"]
    content = fetch(f"{url}/{shard}").content
    first = data.draw(st.integers(0, len(content) - 1))
    last = data.draw(st.integers(first, len(content) + 10))
    answer = fetch(f"{url}/{shard}", {"Range": f"bytes={first}-{last}"})
    assert answer.content == content[first : last + 1]
    end = min(last, len(content) - 1)
    assert (answer.status, answer.headers["Content-Range"]) == (206, f"bytes {first}-{end}/{len(content)}")
    number = data.draw(st.integers(1, len(content) + 10))
    assert fetch(f"{url}/{shard}", {"Range": f"bytes=-{number}"}).content == content[-number:]


@pytest.mark.parametrize("kind", ["joined", "exported"])
@pytest.mark.parametrize("what", ["url", "labels_url"])
def test_conditions_head_and_invalid_ranges(kind: str, what: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    path = f"{url}/{fetch(f'{url}/manifest.json').json()['shards'][1][what]}"
    whole = fetch(path)
    size, etag = str(len(whole.content)), whole.headers["ETag"]
    assert etag.startswith('"')
    head = fetch(path, method="HEAD")
    assert (head.status, head.headers["Content-Length"], head.content) == (200, size, b"")
    assert (head.headers["ETag"], head.headers["Accept-Ranges"]) == (etag, "bytes")
    for known in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        unchanged = fetch(path, {"If-None-Match": known})
        assert (unchanged.status, unchanged.content, unchanged.headers["ETag"]) == (304, b"", etag)
    assert fetch(path, {"If-None-Match": '"other"'}).status == 200
    assert fetch(path, {"If-Match": '"other"'}).status == 412
    part = {"Range": "bytes=5-9"}
    assert fetch(path, part | {"If-Range": etag, "If-Match": etag}).content == whole.content[5:10]
    assert fetch(path, part | {"If-Range": '"other"'}).content == whole.content
    for unusable in ("bytes=9-5", "bytes=1-2,4-5", "lines=1-2", "bytes=-"):
        answer = fetch(path, {"Range": unusable})
        assert (answer.status, answer.content) == (200, whole.content)
    behind = fetch(path, {"Range": f"bytes={size}-"})
    assert (behind.status, behind.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert fetch(path, {"Range": "bytes=-0"}).status == 416


def test_different_filters_have_different_etags_and_equal_ones_the_same(joined: str) -> None:
    path = f"{joined}/shards/{SHARDS[0]}.tar"
    queries = ["", "?selected=false", "?min_confidence=0.5", "?classes=3", "?classes=3,7"]
    tags = [fetch(path + query, method="HEAD").headers["ETag"] for query in queries]
    assert len(set(tags)) == len(queries)
    for alike in ("?min_confidence=0", "?selected=true"):
        assert fetch(path + alike, method="HEAD").headers["ETag"] == tags[0]
    assert fetch(f"{path}?classes=7,3,3", method="HEAD").headers["ETag"] == tags[4]


def test_json_is_compressed_for_those_who_ask(joined: str) -> None:
    for path in ("manifest.json", "openapi.json", ""):
        plain, packed = fetch(f"{joined}/{path}"), fetch(f"{joined}/{path}", {"Accept-Encoding": "br, gzip"})
        assert packed.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(packed.content) == plain.content
        assert packed.headers["ETag"] != plain.headers["ETag"]
        again = fetch(f"{joined}/{path}", {"Accept-Encoding": "gzip", "If-None-Match": packed.headers["ETag"]})
        assert (again.status, again.content) == (304, b"")


@pytest.mark.parametrize("kind", ["joined", "exported"])
def test_the_page_shows_counts_examples_and_images_with_labels(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    answer = fetch(f"{url}/")
    page, manifest = answer.content.decode(), fetch(f"{url}/manifest.json").json()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert f"<b>{manifest['num_samples']}</b><span>samples</span>" in page
    for consumer in ("curl", "webdataset", "Hugging Face", "Ray Data", "DuckDB", "PseudoLabels"):
        assert f"<h3>{consumer}</h3>" in page
    assert all((f"<h3>{consumer}</h3>" in page) == (kind == "exported") for consumer in ("wids", "timm"))
    assert f"{url}/{manifest['shards'][0]['url']}" in page
    assert "digit_3" in page
    number = page.count('src="samples/')
    assert number > 4
    images = [fetch(f"{url}/samples/{n}") for n in range(number)]
    assert {image.headers["Content-Type"] for image in images} == {"image/png"}
    assert len({image.content for image in images}) == number
    assert fetch(f"{url}/samples/{number}").status == fetch(f"{url}/samples/-1").status == 404


def test_only_small_files_of_an_export_are_held_in_memory(run: SmallRun, exported: str) -> None:
    held = set(catalog(run, "latest").files)
    assert "README.md" in held
    assert not [name for name in held if "/" in name or name.endswith(".parquet")], "a table for each shard"
    name = fetch(f"{exported}/manifest.json").json()["shards"][0]["name"]
    assert fetch(f"{exported}/labels/{name}.parquet").status == 200


def test_the_description_has_every_route_and_no_other(joined: str) -> None:
    document = fetch(f"{joined}/openapi.json").json()
    paths = document["paths"]
    known = Handlers(catalog=None, pools=Pools(), metrics=Metrics()).routes()  # type: ignore[arg-type]
    assert set(paths) == set(known)
    assert filters_of(document) == set(PARAMETERS)


def test_an_exports_openapi_has_no_filters(exported: str) -> None:
    assert filters_of(fetch(f"{exported}/openapi.json").json()) == set()


def filters_of(document: dict[str, Any]) -> set[str]:
    """The query parameters of a shard."""
    known = document["components"]["parameters"]
    of_shards = document["paths"]["/shards/{name}.tar"]["head"]["parameters"]
    parameters = [known[one["$ref"].removeprefix("#/components/parameters/")] for one in of_shards]
    return {one["name"] for one in parameters if one["in"] == "query"}


def test_metrics_count_answers_and_bytes(run: SmallRun) -> None:
    with server_thread(catalog(run)) as url:
        assert fetch(f"{url}/healthz").content == b"ok\n"
        size = len(fetch(f"{url}/shards/{SHARDS[0]}.tar").content)
        fetch(f"{url}/shards/nothing.tar")
        wait_for(lambda: 'status="200"' in fetch(f"{url}/metrics").content.decode())  # counted when all is sent
        text = fetch(f"{url}/metrics").content.decode()
    assert f"noisy_student_serve_sent_bytes_total {float(size)}" in text
    assert 'noisy_student_serve_answers_total{route="/shards/{name}.tar",status="200"} 1.0' in text
    assert 'noisy_student_serve_answers_total{route="/shards/{name}.tar",status="404"} 1.0' in text
    assert "process_resident_memory_bytes" in text


def test_only_the_right_token_is_accepted(run: SmallRun) -> None:
    with server_thread(catalog(run), token="right-token") as url:
        for given in ("", "Bearer wrong", "Bearer right-tokem", "Basic right-token", "right-token", "Bearer é"):
            answer = fetch(f"{url}/manifest.json", {"Authorization": given.encode("latin-1")} if given else {})
            assert (answer.status, answer.headers["WWW-Authenticate"][:6]) == (401, "Bearer")
            assert fetch(f"{url}/shards/{SHARDS[0]}.tar", {"Authorization": given.encode("latin-1")}).status == 401
        assert fetch(f"{url}/metrics").status == fetch(f"{url}/nothing").status == 401
        assert fetch(f"{url}/healthz").status == 200
        assert fetch(f"{url}/manifest.json", {"Authorization": "bearer right-token"}).status == 200


def test_tokens_come_from_a_file_or_the_environment_and_invalid_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert read_token(str(file), {SERVER_TOKEN_VARIABLE: "from-environment"}) == "from-file"
    assert read_token(None, {SERVER_TOKEN_VARIABLE: " from-environment "}) == "from-environment"
    assert read_token(None, {}) is None
    file.write_text("\n")
    for token_file, value in (
        (str(file), "x"),
        (str(tmp_path / "none"), "x"),
        (None, ""),
        (None, "two words"),
        (None, "é"),
    ):
        with pytest.raises(UsageError, match=r"serve\.token_file=|NOISY_STUDENT_SERVER_TOKEN"):
            read_token(token_file, {SERVER_TOKEN_VARIABLE: value})


def test_a_token_in_the_clients_variable_does_not_let_the_server_start_without_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"NOISY_STUDENT_TOKEN is the clients'.*NOISY_STUDENT_SERVER_TOKEN"):
        read_token(None, {TOKEN_VARIABLE: "secret"})
    assert read_token(None, {TOKEN_VARIABLE: "https://labels.example=secret"}) is None, "a client's, of another server"
    assert read_token(None, {TOKEN_VARIABLE: "secret", SERVER_TOKEN_VARIABLE: "mine"}) == "mine"
    (tmp_path / "token").write_text("from-file")
    assert read_token(str(tmp_path / "token"), {TOKEN_VARIABLE: "secret"}) == "from-file"


def test_other_addresses_than_loopback_need_a_token_or_open_to_all() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        check_host(host, None, False)
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):
        check_host(host, "token", False)
        check_host(host, None, True)
        with pytest.raises(UsageError, match="there is no token"):
            check_host(host, None, False)


TRAVERSALS = [
    "/shards/../manifest.json", "/shards/..%2f..%2fconfig.yaml", "/shards/%2e%2e/%2e%2e/config.yaml.tar", "/..%2f..%2fconfig.yaml",
    "//etc/passwd", "/%2fetc%2fpasswd", "/shards/%2fetc%2fpasswd.tar", "/labels/..%2f..%2fhashes.parquet", "/shards/a%00b.tar",
    "/config.yaml", "/done.json", "/shards/", "/labels/", "/samples/", "/samples/0/", "/shards/unlabeled-000000.tar/", "/..",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["joined", "exported"])
@pytest.mark.parametrize("path", TRAVERSALS)
def test_names_that_are_not_in_the_catalog_are_not_found(kind: str, path: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(kind)
    host = url.removeprefix("http://").encode()
    answer = raw(url, b"GET " + path.encode() + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert answer.split(b" ")[1] in (b"404", b"400")
    assert b"nosniff" in answer


def test_other_methods_bodies_and_endless_headers_are_refused(joined: str) -> None:
    assert fetch(f"{joined}/manifest.json", method="POST").status == 405
    assert fetch(f"{joined}/manifest.json", method="DELETE").headers["Allow"] == "GET,HEAD"
    head = b"GET /manifest.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    assert raw(joined, head + b"Content-Length: 5\r\n\r\nhello").split(b" ")[1] == b"413"
    assert raw(joined, head + b"X: " + b"x" * 5000 + b"\r\n\r\n").split(b" ")[1] == b"400"
    assert raw(joined, head + b"X: x\r\n" * 100 + b"\r\n").split(b" ")[1] == b"400"
    assert raw(joined, b"GET /?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n").split(b" ")[1] == b"400"


def test_what_a_page_shows_is_escaped(tmp_path: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    names = ["<script>alert(1)</script>", *DIGIT_NAMES[1:]]
    run = SmallRun(tmp_path, make_writer(digits), names)
    run.label(run.config(), with_teacher(run))
    select(run.config(), layout(run))
    with server_thread(catalog(run), open_to_all=True) as url:
        page = raw(url, b'GET / HTTP/1.1\r\nHost: <b>"x\r\nConnection: close\r\n\r\n').decode()
        assert fetch(f"{url}/manifest.json").json()["class_names"] == names
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "<b>&#34;x" not in page
    assert '<b>"x' not in page
    assert "default-src 'none'" in page


def test_serving_is_in_no_fingerprint_and_not_part_of_all(run: SmallRun) -> None:
    changed = run.config(serve={"host": "::1", "port": 1, "source": "v3", "max_connections": 3})
    assert changed.fingerprint("") == run.config().fingerprint("")
    assert "serve" not in parse_command(["stage=all"]).stages
    assert parse_command(["stage=serve,export"]).stages == ("export", "serve")


def test_shards_of_a_web_server_are_indexed_and_read_like_any_others(
    run: SmallRun, joined: str, tmp_path: Path
) -> None:
    urls = [f"{joined}/shards/{name}.tar" for name in SHARDS]
    split = open_split(urls, str(tmp_path / "index"))
    assert split.num_samples == fetch(f"{joined}/manifest.json").json()["num_samples"]
    index = split.shards[0].index()
    with ImageReader([urls[0]]) as reader:
        content = reader.read(0, index.column("offset")[1].as_py(), index.column("size")[1].as_py())
    assert decode(content).shape == (8, 8, 3)
    with pytest.raises(DataError, match=r"unlabeled-999999\.tar: no such shard"):
        open_split([f"{joined}/shards/unlabeled-999999.tar"], str(tmp_path / "index"))
