"""The server's life: it listens, answers, and, when asked to stop, finishes what it sends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

from pipeline.serving.access import Gate, secure
from pipeline.serving.catalog import Catalog
from pipeline.serving.handlers import Handlers
from pipeline.serving.metrics import Meters
from pipeline.serving.work import Work

_MAX_LINE, _MAX_FIELD, _MAX_HEADERS = 8190, 4096, 64  # of a request, in bytes; a line has room for 1,000 classes
_IDLE_S = 30.0  # a connection without a request
_SPARE = 64  # connections beyond one for each answer: idle ones, those that are told to come again, health checks
_LOOK_S = 0.1


@dataclass(frozen=True)
class Settings:
    """How to listen; see `pipeline.fields.ServeConfig`."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    max_connections: int = 256
    grace_s: float = 30.0


async def serve_until(
    catalog: Catalog, settings: Settings, stop: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Serve until `stop` is true; what is being sent then has `settings.grace_s` seconds more.

    Args:
        say: is told the address, and when the server stops.

    Raises:
        OSError: the address cannot be listened on.
    """
    async with _listening(catalog, settings) as (url, gate):
        say(url)
        while not stop():
            await asyncio.sleep(_LOOK_S)
        gate.closing = True
        if gate.answering:
            say(f"stopping; {gate.answering} answers have {settings.grace_s:g} seconds to end")


@asynccontextmanager
async def _listening(catalog: Catalog, settings: Settings) -> AsyncIterator[tuple[str, Gate]]:
    """A server that answers inside the block; its URL."""
    work, meters = Work(), Meters()
    gate = Gate(settings.token, settings.max_connections, meters)
    runner = web.AppRunner(
        _app(Handlers(catalog, work, meters), gate),
        access_log=None,
        handler_cancellation=True,  # a client that goes takes its work with it
        keepalive_timeout=_IDLE_S,
        lingering_time=0,
        max_line_size=_MAX_LINE,
        max_field_size=_MAX_FIELD,
        max_headers=_MAX_HEADERS,
        shutdown_timeout=0.1,  # `_drain` has waited
    )
    await runner.setup()
    try:
        server = await _listen(runner, settings)
        meters.watch(lambda: gate.answering, lambda: _num_connections(runner))
        try:
            yield _url(settings.host, server.sockets[0]), gate
        finally:
            server.close()
        await _drain(runner, gate, settings.grace_s)
    finally:
        await _end(runner)
        work.close()


def _app(handlers: Handlers, gate: Gate) -> web.Application:
    app = web.Application(middlewares=gate.middlewares())
    app.on_response_prepare.append(secure)
    for path, handler in handlers.routes().items():
        app.router.add_get(path, handler)  # HEAD too
    return app


async def _listen(runner: web.AppRunner, settings: Settings) -> asyncio.Server:
    """Accept connections, as many as there is room for; more are closed before they cost anything."""
    make, most = runner.server, settings.max_connections + _SPARE
    assert make is not None, "the runner is set up"

    def protocol() -> asyncio.BaseProtocol:
        return make() if _num_connections(runner) < most else _Closed()

    return await asyncio.get_running_loop().create_server(protocol, settings.host, settings.port)


class _Closed(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close it."""
        transport.close()


def _num_connections(runner: web.AppRunner) -> int:
    return len(runner.server.connections) if runner.server else 0


def _url(host: str, bound: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


async def _drain(runner: web.AppRunner, gate: Gate, seconds: float) -> None:
    """Wait until nothing is being answered and the last bytes are the kernel's, or the time is over."""
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if not gate.answering and not any(one.get_write_buffer_size() for one in _transports(runner)):
            return
        await asyncio.sleep(_LOOK_S)


async def _end(runner: web.AppRunner) -> None:
    """Cancel what is left, then its connections: they would wait for their clients."""
    transports = _transports(runner)
    await runner.cleanup()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(_LOOK_S)  # so that they close


def _transports(runner: web.AppRunner) -> list[asyncio.Transport]:
    connections = runner.server.connections if runner.server else []
    return [one.transport for one in connections if one.transport is not None]
