"""Who is answered: the token, how many at once, and how errors are said. Middlewares, the outermost first."""

from __future__ import annotations

import hmac
import ipaddress
import json
import sys
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from data import storage
from data.http_file import TOKEN_VARIABLE
from data.manifest import DataError
from data.redact import redacted
from data.settings import UsageError
from pipeline.serving.filters import FilterError
from pipeline.serving.items import OutdatedError
from pipeline.serving.metrics import Meters

_FREE = ("/healthz",)  # answered without a token
_ALWAYS = ("/healthz", "/metrics")  # answered when there is no room, so that a busy server does not look dead
_RETRY_AFTER_S = "5"


class Gate:
    """Middlewares of one server.

    Args:
        token: what clients must send, or None.
        most: requests answered at once.
    """

    def __init__(self, token: str | None, most: int, meters: Meters) -> None:
        self._token, self._most, self._meters = token, most, meters
        self.answering = 0
        self.closing = False

    def middlewares(self) -> list[Middleware]:
        """In order."""
        return [self._say_errors, self._check_token, self._make_room]

    @web.middleware
    async def _say_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Errors as JSON; a bug's traceback goes to stderr alone."""
        try:
            response = await handler(request)
        except web.HTTPException as error:  # no such route or method
            response = _error(
                error.status, f"{request.method} {request.path}: {error.reason}; see /openapi.json", error.headers
            )
        except FilterError as error:
            response = _error(400, str(error))
        except OutdatedError as error:
            response = _error(409, str(error))
        except (DataError, storage.StorageError, OSError) as error:
            print(f"serve: {request.path}: {redacted(str(error))}", file=sys.stderr)
            response = _error(502, "the files behind this cannot be read now; the server's own messages say why")
        route = request.match_info.route.resource
        self._meters.count_answer(route.canonical if route else "none", response.status)
        return response

    @web.middleware
    async def _check_token(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is None or request.path in _FREE:
            return await handler(request)
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.encode())
        if scheme.lower() != "bearer" or not right:
            header = {"WWW-Authenticate": 'Bearer realm="pseudo-labels"'}
            return _error(401, "a token is needed: Authorization: Bearer TOKEN", header)
        return await handler(request)

    @web.middleware
    async def _make_room(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.can_read_body:
            response = _error(413, "requests have no body here")
            response.force_close()
            return response
        if request.path in _ALWAYS:
            return await handler(request)
        if self.closing or self.answering >= self._most:
            return _error(503, "no room; come again", {"Retry-After": _RETRY_AFTER_S})
        self.answering += 1
        try:
            return await handler(request)
        finally:
            self.answering -= 1


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> web.Response:
    kept = {
        name: value
        for name, value in (headers or {}).items()
        if name.lower() in ("allow", "retry-after", "www-authenticate")
    }
    text = json.dumps({"error": message}) + "\n"
    return web.Response(status=status, text=text, content_type="application/json", headers=kept)


async def secure(request: web.Request, response: web.StreamResponse) -> None:  # noqa: ARG001 (aiohttp's signal)
    """Headers of every answer."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"
    response.headers["Server"] = "noisy-student-pipeline"


def read_token(token_file: str | None, environment: Mapping[str, str]) -> str | None:
    """The token that clients must send: the file's, else the environment's, else none. Raises UsageError for an unusable one."""
    where = f"serve.token_file={token_file}" if token_file else TOKEN_VARIABLE
    try:
        text = storage.read_text(token_file) if token_file else environment.get(TOKEN_VARIABLE)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: expected a file with a token ({error})") from None
    if text is None:
        return None
    token = text.strip()
    if not token or not (token.isascii() and token.isprintable()) or " " in token:
        raise UsageError(f"{where}: expected a token of printable ASCII characters without spaces, but it is not one")
    return token


def check_host(host: str, token: str | None, open_to_all: bool) -> None:
    """Raises UsageError for an address that others can reach, when there is no token."""
    if token is None and not open_to_all and not _is_loopback(host):
        raise UsageError(
            f"serve.host={host}: others can reach it, and there is no token; give serve.token_file=FILE or {TOKEN_VARIABLE}, "
            "or serve.open_to_all=true if everyone may read"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
