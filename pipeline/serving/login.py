"""How a browser gets in: a form takes the token once, and a cookie that no script can read stands for it afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from urllib.parse import parse_qs, urlsplit

from aiohttp import web

from pipeline.pages.render import environment

LOGIN_PATH = "/login"
_LONGEST_FORM = 4096  # bytes
_FORM_S = 10.0  # for a client to send it


def has_cookie(request: web.Request, token: str) -> bool:
    """Whether a request has the cookie that stands for the token."""
    return hmac.compare_digest(request.cookies.get(_name(token), "").encode(), _value(token).encode())


def _name(token: str) -> str:
    """Of the cookie: browsers send a host's cookies to all its ports, so servers with other tokens have other names."""
    return f"pseudo_labels_{_derived(token, 'name')[:8]}"


def _value(token: str) -> str:
    return _derived(token, "value")


def _derived(token: str, what: str) -> str:
    """Hex digest from which the token cannot be found."""
    return hmac.new(token.encode(), f"cookie {what}".encode(), hashlib.sha256).hexdigest()


def login_page(status: int, message: str = "") -> web.Response:
    """The form as a page."""
    page = (
        environment("pipeline.serving.page").get_template("login.html").render(title="Pseudo-labels", message=message)
    )
    return web.Response(
        status=status, text=page, content_type="text/html", charset="utf-8", headers={"Cache-Control": "no-store"}
    )


async def show_login(request: web.Request) -> web.Response:  # noqa: ARG001 (aiohttp's interface)
    """Show the form."""
    return login_page(200)


async def log_in(request: web.Request, token: str) -> web.Response:
    """Answer the form: with the cookie and the way to the page, or with the form again."""
    if not _is_own_form(request):
        return login_page(403, "This form was sent from another site; open this page and give the token here")
    if (form := await _read_form(request)) is None:
        return login_page(413, "The form is too long, or did not arrive in time")
    given = parse_qs(form.decode("utf-8", "replace")).get("token", [""])[0].strip()
    digests = (hashlib.sha256(text.encode()).digest() for text in (given, token))
    if not hmac.compare_digest(*digests):
        return login_page(401, "That is not the token")
    answer = web.Response(status=303, headers={"Location": "./", "Cache-Control": "no-store"})
    answer.set_cookie(_name(token), _value(token), httponly=True, samesite="Strict", path="/", secure=request.secure)
    return answer


def _is_own_form(request: web.Request) -> bool:
    """Whether the form comes from a page of this server; programs send no Origin."""
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == request.host


async def _read_form(request: web.Request) -> bytes | None:
    try:
        async with asyncio.timeout(_FORM_S):
            content = b""
            while (piece := await request.content.read(_LONGEST_FORM + 1 - len(content))) and len(
                content
            ) <= _LONGEST_FORM:
                content += piece
    except TimeoutError:
        return None
    return content if len(content) <= _LONGEST_FORM else None
