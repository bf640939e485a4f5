"""Write to a client's socket past asyncio's transport: files by `sendfile`, pieces in memory without copying them.

A transport asks epoll anew after every write, and copies what the socket does not take at once, which doubles the CPU time of a byte.
Here the socket is watched once per piece, under a descriptor of its own, and written to whenever it has room.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

from aiohttp.abc import AbstractStreamWriter

from data.shards.image_ranges import FileRange

_MAX_WRITE = 4 << 20  # bytes of a file handed to the kernel at once; it takes as many as fit in the socket's buffer
_MAX_PARTS = 512  # buffers handed to the kernel at once; Linux takes 1,024
_MORE = getattr(socket, "MSG_MORE", 0)  # fills a packet with what follows; only Linux has it


class DirectSocket:
    """A client's socket while an answer is written; close it before the transport is aborted.

    Args:
        timeout_s: a client that takes less than `minimum` bytes in this time, and not all, raises TimeoutError.
        count: called with the number of bytes after each write.
    """

    def __init__(
        self, transport: asyncio.Transport, timeout_s: float, minimum: int, count: Callable[[int], None]
    ) -> None:
        self._socket = transport.get_extra_info("socket").dup()  # asyncio refuses to watch a transport's own descriptor
        self._transport, self._timeout_s, self._minimum, self._count = transport, timeout_s, minimum, count

    async def flush(self, writer: AbstractStreamWriter) -> None:
        """Wait until the transport has written all that it has, as the headers. Raises TimeoutError, ConnectionError."""
        self._transport.set_write_buffer_limits(high=0)  # `drain` waits for an empty buffer then
        async with asyncio.timeout(self._timeout_s):
            await writer.drain()

    async def send_file(self, file: BinaryIO, start: int, stop: int) -> int:
        """Send bytes `start` to `stop` of a file; return how many it had.

        Raises:
            TimeoutError, ConnectionError: the client takes nothing, or has left.
            OSError: the file cannot be read.
        """
        source, client = file.fileno(), self._socket.fileno()

        def write(sent: int) -> int:
            return os.sendfile(client, source, start + sent, min(_MAX_WRITE, stop - start - sent))

        return await self._write(write, stop - start)

    async def send(self, parts: Sequence[bytes | memoryview | FileRange]) -> None:
        """Send parts, one after the other.

        Raises:
            TimeoutError, ConnectionError: the client takes nothing, or has left.
            OSError: a file cannot be read, or has become shorter.
        """
        left, total = _Left(part for part in parts if len(part)), sum(map(len, parts))
        if missing := total - await self._write(lambda _: left.write(self._socket), total):
            raise OSError(f"a file has become shorter: {missing} bytes are missing")

    async def _write(self, write: Callable[[int], int], total: int) -> int:
        """Call `write(bytes so far)` whenever the socket has room, until `total` or until it writes nothing; return the bytes."""
        loop = asyncio.get_running_loop()
        writing = _Writing(write, total, self._count, loop.create_future())
        writing.step()
        loop.add_writer(self._socket, writing.step)
        try:
            return await writing.wait(self._timeout_s, self._minimum)
        finally:
            loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close this descriptor; the transport keeps its own."""
        self._socket.close()


class _Left:
    """Parts that are still to be sent."""

    def __init__(self, parts: Iterable[bytes | memoryview | FileRange]) -> None:
        self._parts, self._first = list(parts), 0

    def write(self, client: socket.socket) -> int:
        """Send as much as the socket has room for, or _MAX_WRITE; return the bytes. Raises BlockingIOError if that is none."""
        total = 0
        while self._first < len(self._parts) and total < _MAX_WRITE:
            try:
                sent = self._send_next(client)
            except BlockingIOError:
                if not total:
                    raise
                break
            if not sent:  # the end of a file that has become shorter
                break
            total += sent
            self._drop(sent)
        return total

    def _send_next(self, client: socket.socket) -> int:
        """Send a range of a file, or all parts before the next range."""
        part = self._parts[self._first]
        if isinstance(part, FileRange):
            return os.sendfile(client.fileno(), part.descriptor, part.offset, min(part.size, _MAX_WRITE))
        upcoming = self._parts[self._first : self._first + _MAX_PARTS]
        until_range = itertools.takewhile(lambda one: not isinstance(one, FileRange), upcoming)
        run = [one for one in until_range if not isinstance(one, FileRange)]  # the condition for mypy alone
        return client.sendmsg(run, [], _MORE if len(run) < len(upcoming) else 0)

    def _drop(self, count: int) -> None:
        """Remove the first `count` bytes."""
        while count and len(part := self._parts[self._first]) <= count:
            count -= len(part)
            self._first += 1
        if count:
            self._parts[self._first] = (part if isinstance(part, FileRange) else memoryview(part))[count:]


class _Writing:
    """Bytes on their way to one socket.

    Args:
        ended: set to the error that ended it, or None. (An exception that nobody awaits, as the client left, would be logged.)
    """

    def __init__(
        self,
        write: Callable[[int], int],
        total: int,
        count: Callable[[int], None],
        ended: asyncio.Future[OSError | None],
    ) -> None:
        self._write, self._total, self._count, self._ended = write, total, count, ended
        self._sent = 0

    def step(self) -> None:
        """Write once, as much as the socket takes."""
        if self._ended.done():
            return
        try:
            sent = self._write(self._sent) if self._sent < self._total else 0
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._ended.set_result(error)
            return
        self._count(sent)
        self._sent += sent
        if not sent or self._sent == self._total:
            self._ended.set_result(None)

    async def wait(self, timeout_s: float, minimum: int) -> int:
        """Wait for the end; return the bytes written. Raises TimeoutError after `timeout_s` with less than `minimum` more bytes."""
        before = 0
        while not (await asyncio.wait({self._ended}, timeout=timeout_s))[0]:
            if self._sent - before < minimum:
                raise TimeoutError
            before = self._sent
        if (error := self._ended.result()) is not None:
            raise error
        return self._sent
