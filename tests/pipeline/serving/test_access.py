"""Access control: Host names and tokens."""

from __future__ import annotations

import base64
import html
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.serving.credentials import has_token, names_loopback
from tests.pipeline.serving.conftest import LABELS, SHARD, TOKEN
from tests.serving import catalog, fetch, raw, server_thread
from tests.small_run import SmallRun


def basic(password: str, user: str = "me") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode(), "Accept": "text/html"}


LOOPBACK = [
    "localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "127.1.2.3:80", "[::1]", "[::1]:8080",
]  # fmt: skip
OTHERS = [
    "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "[::2]", "0.0.0.0", "[::]",
    "localhost@evil.example", "evil.example#localhost", "local host", "localhost:x", "localhost:999999", "[localhost]", "", "::1",
    "localhost.", "localhost,evil.example",
]  # fmt: skip


def test_loopback_names_are_told_from_other_hosts() -> None:
    assert [name for name in LOOPBACK if not names_loopback(name)] == []
    assert [name for name in OTHERS if names_loopback(name)] == []


@pytest.mark.parametrize(
    "path", ["/", "/manifest.json", f"/{SHARD}", f"/{LABELS}", "/samples/0", "/metrics", "/openapi.json", "/x"]
)
def test_without_a_token_other_host_names_are_refused(joined: str, path: str) -> None:
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
def test_no_form_of_a_request_smuggles_a_host_name(joined: str, head: bytes) -> None:
    assert raw(joined, head + b"\r\nConnection: close\r\n\r\n").split(b" ")[1] in (b"421", b"400")


def test_a_missing_host_is_accepted_and_with_a_token_or_open_to_all_any_host(run: SmallRun, joined: str) -> None:
    assert raw(joined, b"GET /manifest.json HTTP/1.0\r\n\r\n").split(b" ")[1] == b"200"
    for settings in ({"open_to_all": True}, {"token": TOKEN}):
        with server_thread(catalog(run), **settings) as url:
            answer = fetch(f"{url}/manifest.json", {"Host": "labels.example", "Authorization": f"Bearer {TOKEN}"})
            assert answer.status == 200


def test_with_the_token_as_a_password_there_are_page_and_images(locked: str) -> None:
    for accept in (b"Accept: text/html\r\n", b""):
        asked = raw(locked, b"GET / HTTP/1.1\r\nHost: a\r\n" + accept + b"Connection: close\r\n\r\n")
        assert asked.split(b" ")[1] == b"401"
        assert b"Bearer realm" in asked
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


def test_wrong_passwords_and_other_schemes_are_refused(locked: str) -> None:
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
    """Return the page's code examples by consumer."""
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
