"""Who is answered: under which name, with which token, how many at once, and how errors are said. Middlewares, the outermost first."""

from __future__ import annotations

import sys

import pyarrow as pa
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from data import storage
from data.shards.split import DataError
from data.storage.redact import redacted
from pipeline.serving.blocking_pool import BusyError
from pipeline.serving.credentials import has_token, names_loopback
from pipeline.serving.errors import error_response
from pipeline.serving.filters import FilterError
from pipeline.serving.items import OutdatedError
from pipeline.serving.metrics import Meters

_FREE = ("/healthz",)  # answered without a token, and under any name
_ALWAYS = ("/healthz", "/metrics")  # answered when there is no room, so that a busy server does not look dead
_RETRY_AFTER = ("Retry-After", "5")
_BEARER, _BASIC = (
    ("WWW-Authenticate", f'{scheme} realm="pseudo-labels"{more}')
    for scheme, more in (("Bearer", ""), ("Basic", ', charset="UTF-8"'))
)


class Gate:
    """Middlewares of one server.

    Args:
        token: what clients must send, or None.
        most: requests answered at once.
        any_name: answer under any Host; else only under names of this machine (see `names_loopback`).
    """

    def __init__(self, token: str | None, most: int, meters: Meters, any_name: bool = True) -> None:
        self._token, self._most, self._meters, self._any_name = token, most, meters, any_name
        self.answering = 0
        self.closing = False
        self._busy: set[web.RequestHandler] = set()

    def middlewares(self) -> list[Middleware]:
        """In order."""
        return [self._note_busy, self._say_errors, self._check_name, self._check_token, self._make_room]

    def is_busy(self, connection: web.RequestHandler) -> bool:
        """Whether a request of the connection is being answered."""
        return connection in self._busy

    @web.middleware
    async def _note_busy(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        self._busy.add(connection)
        try:
            return await handler(request)
        finally:
            self._busy.discard(connection)

    @web.middleware
    async def _say_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors as JSON; a bug's traceback goes to stderr alone."""
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
            response = error_response(503, "too many new filters at once; come again", [_RETRY_AFTER])
        except (DataError, storage.StorageError, OSError, pa.ArrowException) as error:
            print(f"serve: {request.rel_url.raw_path}: {redacted(str(error))}", file=sys.stderr)
            response = error_response(
                502, "the files behind this cannot be read now; the server's own messages say why"
            )
        route = request.match_info.route.resource
        self._meters.count_answer(route.canonical if route else "none", response.status)
        return response

    @web.middleware
    async def _check_name(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse other names than this machine's: a web page elsewhere can make its own name lead here, and read."""
        names = {request.host, *request.headers.getall("Host", ())} - {""}
        if self._any_name or request.path in _FREE or all(map(names_loopback, names)):
            return await handler(request)
        return error_response(
            421, "this server answers as localhost alone; to others with a token, or with serve.open_to_all=true"
        )

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if self._token is None or request.path in _FREE or has_token(given, self._token):
            return await handler(request)
        is_browser = "text/html" in request.headers.get("Accept", "")
        message = "a token is needed: Authorization: Bearer TOKEN, or as the password of any user name"
        return error_response(401, message, [_BEARER, _BASIC] if is_browser else [_BEARER])

    @web.middleware
    async def _make_room(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.can_read_body:
            return error_response(413, "requests have no body here", close=True)
        if request.path in _ALWAYS:
            return await handler(request)
        if self.closing or self.answering >= self._most:
            return error_response(503, "no room; come again", [_RETRY_AFTER])
        self.answering += 1
        try:
            return await handler(request)
        finally:
            self.answering -= 1


async def secure(request: web.Request, response: web.StreamResponse) -> None:  # noqa: ARG001 (aiohttp's signal)
    """Headers of every answer."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.headers["Server"] = "noisy-student-pipeline"
