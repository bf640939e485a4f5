"""A token goes to the origin that it is for, and to no other: not by another name, port or scheme, and not by a redirect."""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.request import Request

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import storage
from data.labels.overlay import RowFilter
from data.labels.sources.archives import Archive, Archives
from data.storage import web_tokens
from data.storage.retry import StorageError
from data.storage.web_tokens import TOKEN_VARIABLE, give_token, origin_of, parse_tokens, token_for

SECRET = "s3cret,with=signs"
ORIGIN = "https://labels.example:8443"


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(web_tokens, "_given", {})


@contextmanager
def web_server(answer: Any) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on loopback: its address, and the headers of each request. `answer(handler)` answers."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, status: int = 200, **headers: str) -> None:
    body = b"x" if status in (200, 206) else b""
    handler.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(body))}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def test_only_the_origin_that_is_named_gets_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f"{ORIGIN}={SECRET}, http://other.example=second")
    for url in (ORIGIN, f"{ORIGIN}/a/b.tar?x=y", "HTTPS://Labels.Example:8443/x", f"{ORIGIN}?q", f"{ORIGIN}#f"):
        assert token_for(url) == SECRET
    for url in ("http://other.example/x", "http://other.example:80", "http://other.example:0080/"):
        assert token_for(url) == "second"
    for url in (
        "http://labels.example:8443/x", "https://labels.example/x", "https://labels.example:84430", "https://labels.example:844",
        "https://labels.example:8443.evil.example/", "https://evil.example/https://labels.example:8443/",
        "https://labels.example:8443@evil.example/", "https://evil.example#labels.example:8443", "https://other.example/",
        "https://evil.example\\@labels.example:8443/", "https://user@labels.example:8443/", "https://sub.labels.example:8443/",
        "https://labels.example.:8443/", "s3://labels.example:8443/x", "/labels.example:8443", "",
    ):  # fmt: skip
        assert token_for(url) is None, url


def test_requests_carry_the_token_to_its_server_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(send) as (mine, to_me), web_server(send) as (other, to_other):
        monkeypatch.setenv(TOKEN_VARIABLE, f"{mine}={SECRET}")
        assert storage.read_bytes(f"{mine}/x") == storage.read_bytes(f"{other}/x") == b"x"
        named = other.replace("127.0.0.1", "localhost")
        storage.read_bytes(f"{named}/x")
    assert {headers.get("Authorization") for headers in to_me} == {f"Bearer {SECRET}"}
    assert not [headers for headers in to_other if "Authorization" in headers]


def test_ranges_that_are_read_ahead_carry_it_to_its_server_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as servers:
        other, to_other = servers.enter_context(
            web_server(lambda asked: send(asked, 206, **{"Content-Range": "bytes 0-0/1"}))
        )
        mine, to_me = servers.enter_context(web_server(lambda asked: send(asked, 307, Location=f"{other}/x")))
        monkeypatch.setenv(TOKEN_VARIABLE, f"{mine}={SECRET}")
        file = storage.open_ranges(f"{mine}/x")
        assert file is not None
        assert file.begin(0, 1).result(60) == b"x"
    assert {headers.get("Authorization") for headers in to_me} == {f"Bearer {SECRET}"}
    assert [headers.get("Range") for headers in to_other] == ["bytes=0-0"]
    assert not [headers for headers in to_other if "Authorization" in headers]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_does_not_carry_it(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    with ExitStack() as servers:
        other, to_other = servers.enter_context(web_server(send))
        mine, to_me = servers.enter_context(web_server(lambda asked: send(asked, status, Location=f"{other}/x")))
        monkeypatch.setenv(TOKEN_VARIABLE, f"{mine}={SECRET}")
        assert storage.read_bytes(f"{mine}/x") == b"x"
    assert to_me[0]["Authorization"] == f"Bearer {SECRET}"
    assert to_other
    assert not [headers for headers in to_other if "Authorization" in headers]


@pytest.mark.parametrize("text", [SECRET, "Bearer x", f"labels.example={SECRET}", f"https://a@b={SECRET}", f"{ORIGIN}/path={SECRET}",
                                  f"{ORIGIN}=", f"{ORIGIN}=a b", f"{ORIGIN}=é", f"{ORIGIN}=a\nb"])  # fmt: skip
def test_a_token_that_names_no_origin_is_sent_nowhere_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    parse_tokens.cache_clear()
    monkeypatch.setenv(TOKEN_VARIABLE, text)
    with web_server(send) as (url, seen), caplog.at_level(logging.WARNING, "data.storage.web_tokens"):
        for _ in range(2):
            storage.read_bytes(f"{url}/x")
    assert not [headers for headers in seen if "Authorization" in headers]
    assert len(caplog.records) == 1, "once"
    assert "NOISY_STUDENT_TOKEN=https://HOST:PORT=TOKEN" in caplog.text
    assert SECRET not in caplog.text
    assert token_for(ORIGIN) is None


def test_a_refusal_says_in_which_form_the_token_is_expected() -> None:
    with web_server(lambda handler: send(handler, 401)) as (url, _), pytest.raises(StorageError) as error:
        storage.read_bytes(f"{url}/x")
    assert f"{TOKEN_VARIABLE}={url}=TOKEN" in str(error.value)


def test_a_token_that_is_given_counts_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f"{ORIGIN}=from-environment")
    give_token(f"{ORIGIN}/v1/", "given")
    assert token_for(f"{ORIGIN}/other") == "given"
    assert token_for("https://labels.example/other") is None
    for url, token in (
        (ORIGIN, f"{SECRET}\n"),
        (ORIGIN, ""),
        (ORIGIN, "é"),
        ("https://a@b", SECRET),
        ("s3://b", SECRET),
    ):
        with pytest.raises(StorageError) as error:
            give_token(url, token)
        assert SECRET not in str(error.value)


def test_a_source_takes_its_token_along_to_other_processes_and_does_not_show_it() -> None:
    archives = Archives((Archive(f"{ORIGIN}/shards/a.tar", "", 1, None),), None, RowFilter(), SECRET)
    assert SECRET not in repr(archives)
    sent = pickle.loads(pickle.dumps(archives))
    sent._identify()
    assert token_for(ORIGIN) == SECRET


HOSTS = st.sampled_from(["a", "a.b", "b.a", "xa", "a-b", "127.0.0.1", "[::1]"])
PORTS = st.sampled_from(["", ":80", ":443", ":8080", ":808"])
SCHEMES = st.sampled_from(["http", "https", "HTTP"])
TAILS = st.text(alphabet="/?#@:\\a.[]", max_size=8)


@given(SCHEMES, HOSTS, PORTS, SCHEMES, HOSTS, PORTS, TAILS)
def test_two_urls_share_a_token_only_where_scheme_host_and_port_are_equal(
    scheme: str, host: str, port: str, other_scheme: str, other_host: str, other_port: str, tail: str
) -> None:
    tokens = parse_tokens(f"{scheme}://{host}{port}={SECRET}")
    assert list(tokens.values()) == [SECRET]
    url = f"{other_scheme}://{other_host}{other_port}{tail}"
    defaults = {"http": ":80", "https": ":443"}
    same = (scheme.lower(), host, port or defaults[scheme.lower()]) == (
        other_scheme.lower(), other_host, other_port or defaults[other_scheme.lower()],
    )  # fmt: skip
    if tail and tail[0] not in "/?#":
        assert origin_of(url) not in tokens or origin_of(url) == origin_of(f"{scheme}://{host}{port}")
    else:
        assert (origin_of(url) in tokens) == same
    if origin_of(url) is not None:  # what is sent to is what was compared
        asked = Request(url)
        assert f"{asked.type}://{asked.host}".lower().startswith(f"{other_scheme}://{other_host}".lower())
