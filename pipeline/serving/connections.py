"""Limit the number of connections: at the limit, the oldest idle one is closed for a new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from pipeline.serving.access import error_response
from pipeline.serving.metrics import Metrics

_MALFORMED = (
    "expected an HTTP/1.1 request: a line of at most {max_line_size} bytes and at most {max_headers} headers of at most "
    "{max_field_size} bytes"
)


class Connection(web.RequestHandler):
    """aiohttp's connection, listed in `open_connections` until it is lost; logs no traceback for a malformed request."""

    def __init__(self, open_connections: _OpenConnections, server: web.Server, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self.opened: asyncio.Transport | None = None
        self._open_connections = open_connections
        open_connections[self] = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport; abort it if `evict` came first."""
        assert isinstance(transport, asyncio.Transport)
        self.opened = transport
        super().connection_made(transport)
        if self not in self._open_connections:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Remove the connection from the list."""
        self._open_connections.discard(self)
        super().connection_lost(exc)

    def evict(self) -> None:
        """Close the connection at once."""
        self._open_connections.discard(self)
        if self.opened is not None:
            self.opened.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer a malformed request with JSON; leave bugs (status ≥ 500) to aiohttp. Raises ConnectionError if the client left."""
        if isinstance(exc, ConnectionError):
            raise exc
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        limits = {name: getattr(self, name) for name in ("max_line_size", "max_headers", "max_field_size")}
        return error_response(status, _MALFORMED.format(**limits), close=True)


class _OpenConnections(dict[Connection, None]):
    """Open connections, the oldest first; `metrics` has their number."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics

    def __setitem__(self, connection: Connection, value: None) -> None:
        super().__setitem__(connection, value)
        self.metrics.set_connections(len(self))

    def discard(self, connection: Connection) -> None:
        """Remove a connection if it is there."""
        self.pop(connection, None)
        self.metrics.set_connections(len(self))


class Connections:
    """Protocol factory for `create_server`.

    Args:
        server: aiohttp's.
        maximum: connections open at once, in all processes.
        is_busy: whether a connection is being answered; busy ones are not closed.
        metrics: counts them.
        options: aiohttp's, for each connection.
    """

    def __init__(
        self,
        server: web.Server,
        maximum: int,
        is_busy: Callable[[web.RequestHandler], bool],
        metrics: Metrics,
        options: dict[str, Any],
    ) -> None:
        self._server, self._maximum, self._is_busy, self._options = server, maximum, is_busy, options
        self._open = _OpenConnections(metrics)

    def __call__(self) -> asyncio.BaseProtocol:
        """Return the protocol of a new connection."""
        if self._open.metrics.num_connections >= self._maximum:
            idle = next((connection for connection in self._open if not self._is_busy(connection)), None)
            if idle is None:
                return _Refused()
            idle.evict()
        return Connection(self._open, self._server, **self._options)

    def __len__(self) -> int:
        """Number of open connections."""
        return len(self._open)

    def transports(self) -> list[asyncio.Transport]:
        """Transports of the open connections."""
        return [connection.opened for connection in self._open if connection.opened is not None]


class _Refused(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()
