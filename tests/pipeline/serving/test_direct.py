"""What is written past the transport arrives whole and in order, at any pace; a client that takes nothing is noticed."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from data.shards.image_ranges import FileRange
from pipeline.serving.direct import DirectSocket

CONTENT = random.Random(0).randbytes(3_000_000)
Send = Callable[[DirectSocket], Awaitable[object]]


class Transport:
    """As much of a transport as DirectSocket uses."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return self._socket


async def exchange(send: Send, seconds: float = 60.0, minimum: int = 1, take: int = len(CONTENT) + 1) -> bytes:
    """What a client receives that takes `take` bytes, 10 kB at a time, with a small buffer in between."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        counts: list[int] = []
        with closing(DirectSocket(Transport(ours), seconds, minimum, counts.append)) as direct:  # type: ignore[arg-type]
            received = asyncio.create_task(receive(theirs, take))
            try:
                await send(direct)
            finally:
                ours.shutdown(socket.SHUT_WR)
                content = await received
        assert sum(counts) >= len(content)
        return content


async def receive(client: socket.socket, take: int) -> bytes:
    parts, loop = b"", asyncio.get_running_loop()
    while len(parts) < take and (part := await loop.sock_recv(client, min(10_000, take - len(parts)))):
        parts += part
    return parts


@pytest.mark.parametrize("num_parts", [1, 7, 2000])
def test_parts_arrive_in_order_however_many_there_are(num_parts: int) -> None:
    size = -(-len(CONTENT) // num_parts)
    parts = [CONTENT[at : at + size] for at in range(0, len(CONTENT), size)]
    assert asyncio.run(exchange(lambda direct: direct.send([b"", *(memoryview(part) for part in parts)]))) == CONTENT


@pytest.mark.parametrize("num_parts", [2, 40, 1500])
def test_ranges_of_files_arrive_between_other_parts(tmp_path: Path, num_parts: int) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    size = -(-len(CONTENT) // num_parts)
    with (tmp_path / "file").open("rb") as file:
        parts: list[bytes | FileRange] = []
        for at in range(0, len(CONTENT), size):
            length = min(size, len(CONTENT) - at)
            is_range = random.Random(at).random() < 0.5
            parts.append(FileRange(file.fileno(), at, length) if is_range else CONTENT[at : at + length])
        assert asyncio.run(exchange(lambda direct: direct.send(parts))) == CONTENT


def test_a_range_of_a_file_that_became_shorter_is_an_error_and_no_byte_is_made_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT[:100])
    received: list[bytes] = []

    async def send(direct: DirectSocket) -> None:
        with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="shorter: 110 bytes are missing"):
            await direct.send([b"before", FileRange(file.fileno(), 10, 190), b"after....."])

    received.append(asyncio.run(exchange(send)))
    assert received == [b"before" + CONTENT[10:100]]


def test_no_parts_are_sent_at_once() -> None:
    assert asyncio.run(exchange(lambda direct: direct.send([]))) == b""


@pytest.mark.parametrize(("start", "stop"), [(0, len(CONTENT)), (5, 2_500_000), (7, 7)])
def test_a_range_of_a_file_arrives(tmp_path: Path, start: int, stop: int) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with (tmp_path / "file").open("rb") as file:
        assert asyncio.run(exchange(lambda direct: direct.send_file(file, start, stop))) == CONTENT[start:stop]


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT[:100])
    sent: list[int] = []

    async def send(direct: DirectSocket) -> None:
        with (tmp_path / "file").open("rb") as file:
            sent.append(await direct.send_file(file, 10, 200))

    assert asyncio.run(exchange(send)) == CONTENT[10:100]
    assert sent == [90]


@pytest.mark.parametrize("take", [0, 50_000], ids=["nothing", "less than the minimum"])
def test_a_client_that_takes_too_little_is_given_up(take: int) -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(exchange(lambda direct: direct.send([CONTENT]), seconds=0.2, minimum=1_000_000, take=take))


def test_a_client_that_has_left_is_a_connection_error() -> None:
    async def leave() -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        ours.setblocking(False)
        with ours, closing(DirectSocket(Transport(ours), 60, 1, lambda _: None)) as direct:  # type: ignore[arg-type]
            await direct.send([CONTENT])

    with pytest.raises(ConnectionError):
        asyncio.run(leave())
