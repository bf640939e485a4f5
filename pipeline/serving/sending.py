"""Send a file or a range of it, at the pace of the client."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing
from typing import BinaryIO

from aiohttp import web

from data.storage.redact import redacted
from pipeline.serving.blocking_pool import AsyncCache, BlockingPool, LockedIterator
from pipeline.serving.catalog import Content, ServedFile, bytes_content
from pipeline.serving.direct import DirectSocket
from pipeline.serving.metrics import Metrics
from pipeline.serving.request_headers import Span, condition_status, requested_span

SEND_TIMEOUT_S = 60.0  # a client that takes less than _TIMED_BYTES in this time is disconnected
_TIMED_BYTES = 1 << 20


class Sender:
    """Answers requests for files."""

    def __init__(self, pool: BlockingPool, metrics: Metrics) -> None:
        self._pool, self._metrics = pool, metrics

    async def send(self, request: web.Request, file: ServedFile, cache: AsyncCache) -> web.StreamResponse:
        """Send the file, or a range of it, or 304, 412 or 416.

        Args:
            cache: of contents by ETag.

        Raises:
            OutdatedError and whatever `file.load` raises, before anything is sent. Later errors end the connection.
        """
        headers = {"ETag": file.etag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
        if status := condition_status(request.headers, file.etag):
            return web.Response(status=status, headers=headers)
        await self._pool.run(file.check)
        content = await cache.get(file.etag, file.load)
        span = requested_span(request.method, request.headers, file.etag, content.size)
        if span is None:
            return web.Response(status=416, headers=headers | {"Content-Range": f"bytes */{content.size}"})
        if span.is_partial:
            headers["Content-Range"] = span.content_range()
        return await self._answer(request, content, span, headers | {"Content-Type": file.media_type})

    async def send_bytes(self, request: web.Request, content: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        """Send bytes that are in memory, whole."""
        return await self._answer(request, bytes_content(content), Span(0, len(content), len(content), False), headers)

    async def _answer(
        self, request: web.Request, content: Content, span: Span, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        is_head = request.method == "HEAD"
        file = await self._open(content.open) if content.open and not is_head else None
        try:
            response = web.StreamResponse(status=206 if span.is_partial else 200, headers=headers)
            response.content_length = span.stop - span.start
            await self._send(request, response, None if is_head else content, file, span)
        finally:
            if file is not None:
                file.close()
        return response

    async def _open(self, open_file: Callable[[], BinaryIO]) -> BinaryIO:
        """Open a file in a thread; close it if the request is cancelled meanwhile, because the client has left."""
        in_thread, in_loop = self._pool.submit(open_file)
        try:
            return await asyncio.shield(in_loop)
        except asyncio.CancelledError:
            in_thread.add_done_callback(_close_opened)
            raise

    async def _send(
        self,
        request: web.Request,
        response: web.StreamResponse,
        content: Content | None,
        file: BinaryIO | None,
        span: Span,
    ) -> None:
        """Send headers and bytes. On failure abort the connection: the headers have promised more bytes."""
        try:
            writer = await response.prepare(request)
            if content is not None and writer is not None and request.transport is not None:
                with closing(self._direct(request.transport)) as client:
                    await client.flush(writer)
                    await self._send_body(client, content, file, span)
        except ConnectionError:
            pass  # the client has left
        except TimeoutError:
            _abort(request)
        except (ValueError, OSError) as error:  # the data have changed or are gone
            print(f"serve: {request.rel_url.raw_path}: {redacted(str(error))}", file=sys.stderr)
            _abort(request)

    def _direct(self, transport: asyncio.Transport) -> DirectSocket:
        return DirectSocket(transport, SEND_TIMEOUT_S, _TIMED_BYTES, self._metrics.count_bytes)

    async def _send_body(self, client: DirectSocket, content: Content, file: BinaryIO | None, span: Span) -> None:
        if file is None:
            await self._send_pieces(client, content, span)
        elif missing := span.stop - span.start - await client.send_file(file, span.start, span.stop):
            raise OSError(f"{missing} bytes are missing at the end")

    async def _send_pieces(self, client: DirectSocket, content: Content, span: Span) -> None:
        pieces, num_left = LockedIterator(content.read(span.start, span.stop)), span.stop - span.start
        try:
            while num_left:
                if (piece := await self._pool.run(pieces.next)) is None:
                    raise OSError(f"{num_left} bytes are missing at the end")
                await client.send(piece)
                num_left -= sum(map(len, piece))
        finally:
            self._pool.run_later(pieces.close)


def _close_opened(opening: Future[BinaryIO]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _abort(request: web.Request) -> None:
    """Reset the connection, so that the client notices and the kernel drops its buffer."""
    if request.transport is not None:  # else the client has left
        bound = request.transport.get_extra_info("socket")
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
