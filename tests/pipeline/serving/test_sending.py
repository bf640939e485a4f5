"""What is opened for a client is closed when it leaves: files that are not open yet, and those that a joined shard is read from."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import BinaryIO

import pytest

from pipeline.serving.blocking_pool import BlockingPool
from pipeline.serving.catalog import Content, Piece
from pipeline.serving.metrics import Metrics
from pipeline.serving.request_headers import Span
from pipeline.serving.sending import Sender


def test_a_file_that_is_open_only_after_its_client_left_is_closed(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"x")
    may_open, opened, pool = Event(), list[BinaryIO](), BlockingPool()

    def open_slowly() -> BinaryIO:
        may_open.wait()
        opened.append((tmp_path / "shard.tar").open("rb"))
        return opened[0]

    async def leave() -> None:
        request = asyncio.create_task(Sender(pool, Metrics())._open(open_slowly))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        may_open.set()

    asyncio.run(leave())
    pool.close()
    assert [file.closed for file in opened] == [True]


def test_a_file_that_a_client_waits_for_stays_open(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"x")
    pool = BlockingPool()

    async def wait() -> bytes:
        with await Sender(pool, Metrics())._open(lambda: (tmp_path / "shard.tar").open("rb")) as file:
            return file.read()

    assert asyncio.run(wait()) == b"x"
    pool.close()


def test_the_files_of_a_joined_shard_are_closed_when_its_client_leaves_in_the_middle() -> None:
    pool, sending, closed, steps = BlockingPool(), asyncio.Event(), Event(), list[str]()

    def read(start: int, stop: int) -> Iterator[Piece]:
        try:
            yield [b"x" * (stop - start)]
        finally:
            steps.append("closed")
            closed.set()

    class SlowClient:
        async def send(self, parts: Piece) -> None:
            sending.set()
            try:
                await asyncio.Event().wait()
            finally:
                steps.append(f"{sum(map(len, parts))} bytes are not sent any more")

    pieces = read(0, 5)  # referred to from here, so that it is not closed by being forgotten

    async def leave() -> None:
        content = Content(5, lambda *_: pieces)
        sent = Sender(pool, Metrics())._send_pieces(SlowClient(), content, Span(0, 5, 5, False))  # type: ignore[arg-type]
        request = asyncio.create_task(sent)
        await sending.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(leave())
    assert closed.wait(60)
    pool.close()
    assert steps == ["5 bytes are not sent any more", "closed"]
