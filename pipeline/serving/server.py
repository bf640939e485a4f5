"""stage=serve: pseudo-labels over HTTP, read-only: a run's labels joined to its images while sending, or an exported version."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from aiohttp import web
from pydantic import BaseModel

from data import storage
from data.base_names import check_base_name, read_pointer
from data.labels.label_files import COPIES_REMEDY
from data.labels.sources.archives import LATEST_NAME
from pipeline.core import interrupt
from pipeline.core.committed_files import read_output_json
from pipeline.core.layout import SELECTION_NAME, Layout
from pipeline.core.schema import Config, ServeConfig
from pipeline.core.stage import StageError, done_record, require_done
from pipeline.serving.access import AccessMiddleware, add_security_headers
from pipeline.serving.blocking_pool import Pools
from pipeline.serving.catalog import Catalog
from pipeline.serving.connections import Connections
from pipeline.serving.credentials import check_host, is_loopback, read_token
from pipeline.serving.exported import open_version
from pipeline.serving.handlers import Handlers
from pipeline.serving.joined import JoinedRun
from pipeline.serving.login import LOGIN_PATH, log_in, show_login
from pipeline.serving.metrics import Counts, Metrics
from pipeline.serving.processes import ServingProcesses, default_processes, listen_on, receive_connections
from pipeline.upstream.stage_inputs import open_overlay

_IDLE_S = 10.0  # without a whole request, on a new connection or after the last answer
_CONNECTION: dict[str, Any] = {
    "access_log": None,
    "keepalive_timeout": _IDLE_S,
    "lingering_time": 0,
    "max_line_size": 8190,  # bytes: room for 1,000 classes
    "max_field_size": 4096,
    "max_headers": 64,
}
_SPARE_CONNECTIONS = 64  # beyond one per answer: idle ones, refused requests, health checks
_POLL_S = 0.1


def serve(config: Config, layouts: Sequence[Layout]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        UsageError: an address that other machines can reach, without a token; or an invalid token.
        StageError: there is nothing to serve, or a process of the server has ended.
        OSError: the server cannot listen on the address.
        Interrupted: after a signal.
    """
    fields = config.serve
    token = read_token(fields.token_file, os.environ)
    check_host(fields.host, token, fields.open_to_all)
    catalog = open_catalog(config, layouts)

    def report(message: str) -> None:
        print(f"serve: {catalog.title}: {message}" if message.startswith("http") else f"serve: {message}", flush=True)

    with interrupt.deferred():  # `pending` sees a signal; it is raised when the block ends
        asyncio.run(serve_until(catalog, fields, token, interrupt.pending, report))


def open_catalog(config: Config, layouts: Sequence[Layout]) -> Catalog:
    """Open what `serve.source` names. Raises StageError when it is unfinished; or labels, selection and shards do not match."""
    if config.serve.source == "run":
        return _open_joined(config, layouts)
    out = config.export.out or layouts[0].exports
    folder = storage.join(out, _version(out, config.serve.source))
    summary = require_done(folder, "export")["summary"]
    selections = Layout(config.run_dir, summary["generation"]).selections
    selection = check_base_name(summary["selection"], storage.join(folder, "done.json"))
    return open_version(folder, _class_counts(storage.join(selections, selection)))


def _open_joined(config: Config, layouts: Sequence[Layout]) -> Catalog:
    """Open the labels of the last generation that has a selection."""
    layout = next((layout for layout in reversed(layouts) if layout.current_selection()), layouts[0])
    overlay, labels, _ = open_overlay(config, layout)
    title = f"generation {layout.generation}, selection {storage.base_name(overlay.selection_dir)}"
    names, counts = overlay.provenance.class_names, _class_counts(overlay.selection_dir)
    return JoinedRun(title, layout.generation, names, counts, overlay, labels["summary"]["num_classes"])


def _version(out: str, source: str) -> str:
    if source != "latest":
        return source
    pointer = storage.join(out, LATEST_NAME)
    if not storage.exists(pointer):
        raise StageError(f"{out}: no export yet; run stage=export, or set serve.source=run, which needs none")
    return read_pointer(pointer)


def _class_counts(selection: str) -> list[Mapping[str, Any]]:
    """Read the counts per class from selection.json; empty if the selection is gone."""
    if not storage.exists(storage.join(selection, SELECTION_NAME)):
        return []
    content = read_output_json(selection, SELECTION_NAME, done_record(selection), COPIES_REMEDY, _Selection)
    return list(content["classes"])


class _Selection(BaseModel):
    """The part of `selection.json` that the page shows."""

    classes: list[dict[str, Any]]


async def serve_until(
    catalog: Catalog, config: ServeConfig, token: str | None, stop: Callable[[], bool], report: Callable[[str], None]
) -> None:
    """Serve until `stop()` is true, then give answers in progress `config.grace_s` more seconds.

    Args:
        token: what clients must send, or None.
        report: receives the URL, then a message when the server stops.

    Raises:
        OSError: the server cannot listen on the address.
        StageError: a process of the server has ended.
    """
    counts = Counts(config.processes or default_processes())
    metrics = Metrics(counts)
    listen = _listening if counts.num_processes == 1 else _in_processes
    async with listen(catalog, config, token, counts) as (url, check):
        report(url)
        while not stop():
            check()
            await asyncio.sleep(_POLL_S)
        if metrics.num_answering:
            report(f"stopping; {metrics.num_answering} answers have {config.grace_s:g} seconds to end")


@asynccontextmanager
async def _listening(
    catalog: Catalog, config: ServeConfig, token: str | None, counts: Counts
) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Answer requests in this process inside the block; yield the URL, and a function that does nothing."""
    async with _answering(catalog, config, token, Metrics(counts)) as connections:
        server = await asyncio.get_running_loop().create_server(connections, config.host, config.port)
        try:
            yield _url(config.host, server.sockets[0]), lambda: None
        finally:
            server.close()


@asynccontextmanager
async def _in_processes(
    catalog: Catalog, config: ServeConfig, token: str | None, counts: Counts
) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Let processes answer requests inside the block; yield the URL, and a function that raises StageError when one has ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, config.host, config.port, start_serving=False)
    url, listening = _url(config.host, server.sockets[0]), [bound.dup() for bound in server.sockets]
    server.close()  # its own descriptors: asyncio lets nobody else accept on them
    for bound in listening:
        listen_on(bound)
    processes = ServingProcesses(counts.num_processes, _answer_received, (catalog, config, token, counts))
    tasks: list[asyncio.Task[None]] = []
    try:
        await processes.ready()
        tasks = [loop.create_task(processes.hand_over(bound)) for bound in listening]
        yield url, processes.check
    finally:
        for task in tasks:
            task.cancel()
        for bound in listening:
            bound.close()
        await processes.stop(config.grace_s)


async def _answer_received(
    channel: socket.socket, position: int, catalog: Catalog, config: ServeConfig, token: str | None, counts: Counts
) -> None:
    """Answer the connections that come through `channel`, in a process of its own."""
    async with _answering(catalog, config, token, Metrics(counts, position)) as connections:
        await receive_connections(channel, connections)


@asynccontextmanager
async def _answering(
    catalog: Catalog, config: ServeConfig, token: str | None, metrics: Metrics
) -> AsyncIterator[Connections]:
    """Answer requests of connections, which the yielded protocols are for, inside the block and at most `grace_s` after it."""
    pools = Pools()
    any_host = token is not None or config.open_to_all or not is_loopback(config.host)
    access = AccessMiddleware(token, config.max_connections, metrics, any_host)
    runner = web.AppRunner(
        _app(Handlers(catalog, pools, metrics, token is not None), access, token),
        handler_cancellation=True,  # a client that leaves cancels its handler
        shutdown_timeout=0.1,  # `_drain` has waited
    )
    await runner.setup()
    assert runner.server is not None, "the runner is set up"
    maximum = config.max_connections + _SPARE_CONNECTIONS
    connections = Connections(runner.server, maximum, access.is_busy, metrics, _CONNECTION)
    try:
        yield connections
        access.is_closing = True
        await _drain(connections, access, config.grace_s)
    finally:
        await _shut_down(runner, connections)
        pools.close()


def _app(handlers: Handlers, access: AccessMiddleware, token: str | None) -> web.Application:
    app = web.Application(middlewares=access.middlewares())
    app.on_response_prepare.append(add_security_headers)
    if token is not None:
        app.router.add_post(LOGIN_PATH, partial(log_in, token=token))
        app.router.add_get(LOGIN_PATH, show_login)
    for path, handler in handlers.routes().items():
        app.router.add_get(path, handler)  # HEAD too
    return app


def _url(host: str, bound: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}"


async def _drain(connections: Connections, access: AccessMiddleware, seconds: float) -> None:
    """Wait until all answers are complete and handed to the kernel, at most `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < deadline:
        if not access.num_answering and not any(one.get_write_buffer_size() for one in connections.transports()):
            return
        await asyncio.sleep(_POLL_S)


async def _shut_down(runner: web.AppRunner, connections: Connections) -> None:
    """Cancel the remaining handlers, then abort their connections, which would wait for the clients."""
    transports = connections.transports()
    await runner.cleanup()
    for transport in transports:
        transport.abort()
    await asyncio.sleep(_POLL_S)  # lets the aborted connections close
