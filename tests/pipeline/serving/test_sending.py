"""Files that are opened for a client that leaves before they are open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from threading import Event
from typing import BinaryIO

import pytest

from pipeline.serving.blocking_pool import BlockingPool
from pipeline.serving.metrics import Metrics
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
