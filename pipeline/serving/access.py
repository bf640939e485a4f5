"""Access control as middlewares: Host, token, number of concurrent answers; and errors as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import pyarrow as pa
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from data import storage
from data.errors import DataError
from data.storage.redact import redacted
from pipeline.serving.blocking_pool import BusyError
from pipeline.serving.catalog import OutdatedError
from pipeline.serving.credentials import has_token, names_loopback
from pipeline.serving.filters import FilterError
from pipeline.serving.login import LOGIN_PATH, has_cookie, login_page
from pipeline.serving.metrics import Metrics

_PUBLIC = ("/healthz",)  # needs no token and no known Host
_UNLIMITED = ("/healthz", "/metrics")  # answered at the limit too, so that a busy server does not look dead
_RETRY_AFTER = ("Retry-After", "5")
_BEARER = ("WWW-Authenticate", 'Bearer realm="pseudo-labels"')


def error_response(
    status: int, message: str, headers: Iterable[tuple[str, str]] = (), close: bool = False
) -> web.Response:
    """Return an error as JSON, `{"error": message}`.

    Args:
        close: end the connection afterwards.
    """
    text = json.dumps({"error": message}) + "\n"
    response = web.Response(status=status, text=text, content_type="application/json")
    response.headers.extend([*headers, ("X-Content-Type-Options", "nosniff")])
    if close:
        response.force_close()
    return response


class AccessMiddleware:
    """The middlewares of one server.

    Args:
        token: what clients must send, or None.
        max_answers: requests answered at once, by all processes.
        any_host: accept any Host header; else only names of this machine (see `names_loopback`).

    Attributes:
        num_answering: requests that this process is answering now.
        is_closing: refuse new requests.
    """

    def __init__(self, token: str | None, max_answers: int, metrics: Metrics, any_host: bool = True) -> None:
        self._token, self._max_answers, self._metrics, self._any_host = token, max_answers, metrics, any_host
        self.num_answering = 0
        self.is_closing = False
        self._busy: set[web.RequestHandler] = set()

    def middlewares(self) -> list[Middleware]:
        """Return them, the outermost first."""
        return [self._track_connection, self._convert_errors, self._check_host, self._check_token, self._limit_answers]

    def is_busy(self, connection: web.RequestHandler) -> bool:
        """Whether a request of the connection is being answered."""
        return connection in self._busy

    @web.middleware
    async def _track_connection(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        self._busy.add(connection)
        try:
            return await handler(request)
        finally:
            self._busy.discard(connection)

    @web.middleware
    async def _convert_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Turn expected errors into JSON; details of the server's files go to stderr only."""
        try:
            response = await handler(request)
        except web.HTTPException as error:  # no such route or method
            message = f"{request.method} {request.path}: {error.reason}; see /openapi.json"
            response = error_response(error.status, message, [("Allow", a) for a in error.headers.getall("Allow", ())])
        except FilterError as error:
            response = error_response(400, str(error))
        except OutdatedError as error:
            response = error_response(409, str(error))
        except BusyError:
            response = error_response(503, "too many new filters at once; retry later", [_RETRY_AFTER])
        except (DataError, storage.StorageError, OSError, pa.ArrowException) as error:
            print(f"serve: {request.rel_url.raw_path}: {redacted(str(error))}", file=sys.stderr)
            response = error_response(502, "the server cannot read the files it needs; its stderr says why")
        route = request.match_info.route.resource
        self._metrics.count_answer(route.canonical if route else "none", response.status)
        return response

    @web.middleware
    async def _check_host(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse Host names of other machines (DNS rebinding: a web page's own name resolved to this machine)."""
        names = {request.host, *request.headers.getall("Host", ())} - {""}
        if self._any_host or request.path in _PUBLIC or all(map(names_loopback, names)):
            return await handler(request)
        return error_response(
            421, "this server answers as localhost only; other names need a token, or serve.open_to_all=true"
        )

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is None or request.path in (*_PUBLIC, LOGIN_PATH):
            return await handler(request)
        if has_token(request.headers.get("Authorization", ""), self._token) or has_cookie(request, self._token):
            return await handler(request)
        if "text/html" in request.headers.get("Accept", ""):
            form = login_page(401)
            form.headers.extend([_BEARER])
            return form
        message = "a token is needed: Authorization: Bearer TOKEN, or as the password of any user name"
        return error_response(401, message, [_BEARER])

    @web.middleware
    async def _limit_answers(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.can_read_body and (self._token is None or request.path != LOGIN_PATH):
            return error_response(413, "requests must not have a body", close=True)
        if request.path in _UNLIMITED:
            return await handler(request)
        if self.is_closing or self._metrics.num_answering >= self._max_answers:
            return error_response(503, "no room; retry later", [_RETRY_AFTER])
        self._count_answering(1)
        try:
            return await handler(request)
        finally:
            self._count_answering(-1)

    def _count_answering(self, change: int) -> None:
        self.num_answering += change
        self._metrics.set_answering(self.num_answering)


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:  # noqa: ARG001 (aiohttp's signal)
    """Set the headers that every response has."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Server"] = "noisy-student-pipeline"
