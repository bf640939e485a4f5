"""The server's life: it listens, answers, and, when asked to stop, finishes what it sends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from pipeline.serving.access import Gate, secure
from pipeline.serving.blocking_pool import Workers
from pipeline.serving.catalog import Catalog
from pipeline.serving.connections import Connections
from pipeline.serving.credentials import is_loopback
from pipeline.serving.handlers import Handlers
from pipeline.serving.metrics import Meters

_IDLE_S = 10.0  # without a whole request, on a new connection or after the last answer
_CONNECTION: dict[str, Any] = {
    "access_log": None,
    "keepalive_timeout": _IDLE_S,
    "lingering_time": 0,
    "max_line_size": 8190,  # bytes: room for 1,000 classes
    "max_field_size": 4096,
    "max_headers": 64,
}
_SPARE = 64  # connections beyond one for each answer: idle ones, those that are told to come again, health checks
_LOOK_S = 0.1


@dataclass(frozen=True)
class Settings:
    """How to listen; see `pipeline.core.schema.ServeConfig`."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    open_to_all: bool = False
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
    workers, meters = Workers(), Meters()
    any_name = settings.token is not None or settings.open_to_all or not is_loopback(settings.host)
    gate = Gate(settings.token, settings.max_connections, meters, any_name)
    runner = web.AppRunner(
        _app(Handlers(catalog, workers, meters, settings.token is not None), gate),
        handler_cancellation=True,  # a client that goes takes its work with it
        shutdown_timeout=0.1,  # `_drain` has waited
    )
    await runner.setup()
    assert runner.server is not None, "the runner is set up"
    connections = Connections(runner.server, settings.max_connections + _SPARE, gate.is_busy, _CONNECTION)
    try:
        server = await asyncio.get_running_loop().create_server(connections, settings.host, settings.port)
        meters.watch(lambda: gate.answering, connections.number)
        try:
            yield _url(settings.host, server.sockets[0]), gate
        finally:
            server.close()
        await _drain(connections, gate, settings.grace_s)
    finally:
        await _end(runner, connections)
        workers.close()


def _app(handlers: Handlers, gate: Gate) -> web.Application:
    app = web.Application(middlewares=gate.middlewares())
    app.on_response_prepare.append(secure)
    for path, handler in handlers.routes().items():
        app.router.add_get(path, handler)  # HEAD too
    return app


def _url(host: str, bound: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


async def _drain(connections: Connections, gate: Gate, seconds: float) -> None:
    """Wait until nothing is being answered and the last bytes are the kernel's, or the time is over."""
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if not gate.answering and not any(one.get_write_buffer_size() for one in connections.transports()):
            return
        await asyncio.sleep(_LOOK_S)


async def _end(runner: web.AppRunner, connections: Connections) -> None:
    """Cancel what is left, then its connections: they would wait for their clients."""
    transports = connections.transports()
    await runner.cleanup()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(_LOOK_S)  # so that they close
