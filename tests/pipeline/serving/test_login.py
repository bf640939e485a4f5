"""Browsers get in with the token: a form takes it, and a cookie that no script can read and no other site can send stands for it."""

from __future__ import annotations

import asyncio
import http.client
import re
from urllib.parse import urlencode, urlsplit

import pytest

from tests.browser import CHROMIUM, browser
from tests.pipeline.serving.conftest import TOKEN
from tests.serving import catalog, fetch, server_thread
from tests.small_run import SmallRun


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/login", body, {"Content-Type": "application/x-www-form-urlencoded", **headers})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content


def form(token: str) -> bytes:
    return urlencode({"token": token}).encode()


def test_the_right_token_gives_a_cookie_that_opens_page_images_and_manifest(locked: str) -> None:
    asked = fetch(f"{locked}/", {"Accept": "text/html"})
    assert asked.status == 401
    assert b'type="password"' in asked.content
    status, headers, _ = post(locked, form(TOKEN))
    assert (status, headers["location"]) == (303, "./")
    cookie, *attributes = (part.strip() for part in headers["set-cookie"].split(";"))
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert TOKEN not in cookie
    for path in ("/", "/samples/0", "/manifest.json"):
        assert fetch(locked + path, {"Cookie": f"a=b; {cookie}"}).status == 200
        assert fetch(locked + path, {"Cookie": cookie[:-1] + ("0" if cookie[-1] != "0" else "1")}).status == 401


def test_a_wrong_token_another_site_and_a_long_form_get_none(locked: str) -> None:
    for body in (form("wrong"), form(""), b"", b"token", b"%ff=%ff", form(f"{TOKEN}x")):
        status, headers, content = post(locked, body)
        assert (status, "set-cookie" in headers) == (401, False)
        assert "That is not the token" in content
    host = urlsplit(locked).netloc
    for origin in ("http://evil.example", "null", f"http://{host}.evil.example", "http://127.0.0.1:1"):
        assert post(locked, form(TOKEN), Origin=origin)[0] == 403
    assert post(locked, form(TOKEN), Origin=f"http://{host}")[0] == 303
    assert post(locked, form("x" * 100_000))[0] == 413


def test_the_cookie_of_one_server_opens_no_other(locked: str, run: SmallRun) -> None:
    _, headers, _ = post(locked, form(TOKEN))
    with server_thread(catalog(run), token="another-token") as other:
        assert fetch(f"{other}/", {"Cookie": headers["set-cookie"].split(";")[0]}).status == 401
        assert post(other, form(TOKEN))[0] == 401


def test_without_a_token_there_is_no_form_and_no_body(joined: str) -> None:
    assert fetch(f"{joined}/login").status == 404
    assert post(joined, form("x"))[0] in (404, 413)


def test_a_filter_chooses_the_pictures_of_the_page(joined: str) -> None:
    page = fetch(f"{joined}/?classes=3&min_confidence=0.5&selected=false").content.decode()
    query = "?min_confidence=0.5&amp;classes=3&amp;selected=false"
    sources = re.findall(r'<img src="(samples/\d+[^"]*)" alt="([^"]*)"', page)
    assert sources
    assert {name for _, name in sources} == {"digit_3"}
    assert sources[0][0] == f"samples/0{query}"
    answer = fetch(f"{joined}/{sources[0][0].replace('&amp;', '&')}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    manifest = fetch(f"{joined}/manifest.json?min_confidence=0.5&classes=3&selected=false").json()
    assert f"<p>{manifest['num_samples']} images match." in page
    assert 'href="./?min_confidence=0.8&amp;classes=3&amp;selected=false#images"' in page, (
        "other filters are a link away"
    )
    assert fetch(f"{joined}/?classes=99").status == 400
    nothing = fetch(f"{joined}/?min_confidence=1").content.decode()
    assert "0 images match" in nothing


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium: install the system's package `chromium`")
def test_a_person_logs_in_and_follows_a_class_to_its_pictures(run: SmallRun) -> None:
    async def visit(url: str) -> None:
        async with browser() as page:
            await page.open(url, 400, dark=True)
            assert [fault for fault in await page.faults() if "401" not in fault] == []
            for given in ("wrong", TOKEN):
                script = (
                    f"document.querySelector('input').value = '{given}'; document.querySelector('form').requestSubmit()"
                )
                await page.follow(script)
                shown = await page.evaluate("document.body.innerText")
                assert ("That is not the token" in shown) == (given == "wrong")
            assert await page.evaluate("document.cookie") == "", "no script reads it"
            await page.follow(
                "[...document.querySelectorAll('details a')].find(a => a.innerText === 'digit_3').click()"
            )
            names = await page.evaluate("[...document.images].map(image => image.alt)")
            assert {*names} == {"digit_3"}
            page.errors.clear()
            assert await page.faults() == []

    with server_thread(catalog(run), token=TOKEN) as url:
        asyncio.run(visit(f"{url}/"))
