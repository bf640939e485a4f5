"""Sending a file or a range of it: headers, conditions, and bytes at the pace of the client."""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from collections.abc import Mapping
from typing import BinaryIO

from aiohttp import web

from data.storage.redact import redacted
from pipeline.serving.blocking_pool import Kept, Pieces, Work
from pipeline.serving.items import Body, Item, bytes_body
from pipeline.serving.metrics import Meters
from pipeline.serving.ranges import Span, is_other_version, is_unchanged, requested_span

SEND_TIMEOUT_S = 60.0  # for a piece; a client that takes none of it for so long is cut off
_SENDFILE_BYTES = 1 << 20  # a piece


class Sender:
    """Answers requests for files."""

    def __init__(self, work: Work, meters: Meters) -> None:
        self._work, self._meters = work, meters

    async def send(self, request: web.Request, item: Item, kept: Kept) -> web.StreamResponse:
        """The file, a range of it, or that the client has it already.

        Raises:
            OutdatedError and what `item.load` raises, before anything is sent. Later errors end the connection.
        """
        headers = {"ETag": item.etag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
        if status := condition(request, item.etag):
            return web.Response(status=status, headers=headers)
        await self._work.run(item.check)
        body = await kept.get(item.etag, item.load)
        span = requested_span(request.method, request.headers, item.etag, body.size)
        if span is None:
            return web.Response(status=416, headers=headers | {"Content-Range": f"bytes */{body.size}"})
        if span.is_partial:
            headers["Content-Range"] = span.content_range()
        return await self._answer(request, body, span, headers | {"Content-Type": item.media_type})

    async def send_bytes(self, request: web.Request, content: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        """A whole content that is in memory."""
        body = bytes_body(content)
        return await self._answer(request, body, Span(0, body.size, body.size, False), headers)

    async def _answer(
        self, request: web.Request, body: Body, span: Span, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        wants_content = request.method != "HEAD"
        file = await self._work.run(body.open) if body.open and wants_content else None
        try:
            response = web.StreamResponse(status=206 if span.is_partial else 200, headers=headers)
            response.content_length = span.stop - span.start
            await self._send(request, response, body if wants_content else None, file, span)
        finally:
            if file is not None:
                file.close()
        return response

    async def _send(
        self, request: web.Request, response: web.StreamResponse, body: Body | None, file: BinaryIO | None, span: Span
    ) -> None:
        """Send headers and bytes; the connection is ended where that fails, as the headers have promised more."""
        try:
            await response.prepare(request)
            if body is None:
                return
            if file is not None and request.transport is not None:
                await self._send_file(request.transport, file, span)
            else:
                await self._send_pieces(response, body, span)
        except ConnectionError:
            pass  # the client has gone
        except TimeoutError:
            _abort(request)
        except (ValueError, OSError) as error:  # data that are not there any more
            print(f"serve: {request.rel_url.raw_path}: {redacted(str(error))}", file=sys.stderr)
            _abort(request)

    async def _send_pieces(self, response: web.StreamResponse, body: Body, span: Span) -> None:
        pieces, left = Pieces(body.read(span.start, span.stop)), span.stop - span.start
        try:
            while left:
                if (piece := await self._work.run(pieces.next)) is None:
                    raise OSError(f"{left} bytes are missing at the end")
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await response.write(piece)
                left -= len(piece)
                self._meters.count_bytes(len(piece))
        finally:
            self._work.later(pieces.close)

    async def _send_file(self, transport: asyncio.Transport, file: BinaryIO, span: Span) -> None:
        """By `sendfile`, in pieces, so that a client that stands still is noticed."""
        loop = asyncio.get_running_loop()
        for start in range(span.start, span.stop, _SENDFILE_BYTES):
            count = min(_SENDFILE_BYTES, span.stop - start)
            async with asyncio.timeout(SEND_TIMEOUT_S):
                sent = await loop.sendfile(transport, file, start, count)
            self._meters.count_bytes(sent)
            if sent < count:
                raise OSError(f"{count - sent} bytes are missing at byte {start + sent}")


def condition(request: web.Request, etag: str) -> int | None:
    """The status of an answer without content, where the request's conditions ask for one."""
    if is_other_version(request.headers, etag):
        return 412
    return 304 if is_unchanged(request.headers, etag) else None


def _abort(request: web.Request) -> None:
    """End the connection so that the client notices, and the kernel keeps nothing for it."""
    if request.transport is not None:  # else it has gone already
        bound = request.transport.get_extra_info("socket")
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
