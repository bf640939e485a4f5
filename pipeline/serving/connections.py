"""Connections, and how many of them: at the limit, the oldest that asks for nothing makes room, so that a new client is heard."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from pipeline.serving.errors import error_response

_MALFORMED = (
    "expected an HTTP/1.1 request: a line of at most {max_line_size} bytes and at most {max_headers} headers of at most "
    "{max_field_size} bytes"
)


class Connection(web.RequestHandler):
    """aiohttp's, known from before it is open until it is lost, and without a traceback for each malformed request."""

    def __init__(self, known: dict[Connection, None], server: web.Server, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.opened: asyncio.Transport | None = None
        self._known = known
        known[self] = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport; end it where the connection was given up before."""
        assert isinstance(transport, asyncio.Transport)
        self.opened = transport
        super().connection_made(transport)
        if self not in self._known:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the connection."""
        self._known.pop(self, None)
        super().connection_lost(exc)

    def give_up(self) -> None:
        """End it at once."""
        del self._known[self]
        if self.opened is not None:
            self.opened.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a request that could not be read with 400; of a bug, as aiohttp does. Raises ConnectionError of a client that left."""
        if isinstance(exc, ConnectionError):
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        limits = {name: getattr(self, name) for name in ("max_line_size", "max_headers", "max_field_size")}
        return error_response(status, _MALFORMED.format(**limits), close=True)


class Connections:
    """A factory of connections for `create_server`.

    Args:
        server: aiohttp's.
        most: connections open at once.
        is_busy: whether a connection is being answered; such a one is left alone.
        options: of each connection.
    """

    def __init__(
        self, server: web.Server, most: int, is_busy: Callable[[web.RequestHandler], bool], options: dict[str, Any]
    ) -> None:
        self._server, self._most, self._is_busy, self._options = server, most, is_busy, options
        self._known: dict[Connection, None] = {}  # the oldest first

    def __call__(self) -> asyncio.BaseProtocol:
        """The protocol of a new connection."""
        if len(self._known) >= self._most:
            if (idle := next((one for one in self._known if not self._is_busy(one)), None)) is None:
                return _Closed()
            idle.give_up()
        return Connection(self._known, self._server, **self._options)

    def number(self) -> int:
        """Open connections."""
        return len(self._known)

    def transports(self) -> list[asyncio.Transport]:
        """Of the open connections."""
        return [one.opened for one in self._known if one.opened is not None]


class _Closed(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()
