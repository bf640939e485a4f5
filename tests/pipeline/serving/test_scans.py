"""Slow scans of all labels do not hold up other requests, and are made once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from data.labels.exclusions import ExcludedKeys
from data.labels.overlay import RowFilter
from pipeline.serving.blocking_pool import AsyncCache, BlockingPool, BusyError
from pipeline.serving.joined import JoinedRun
from tests.pipeline.serving.conftest import LABELS, SHARD
from tests.serving import catalog, fetch, server_thread, wait_for
from tests.small_run import SmallRun


def test_other_requests_are_answered_while_every_scan_is_stuck(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun, lock = threading.Event(), [0], threading.Lock()
    entries = JoinedRun.entries

    def slow(self: JoinedRun, keep: RowFilter) -> Any:
        if keep.min_confidence:
            with lock:
                begun[0] += 1
            assert go_on.wait(60)
        return entries(self, keep)

    monkeypatch.setattr(JoinedRun, "entries", slow)
    with server_thread(catalog(run)) as url, ThreadPoolExecutor(40) as pool:
        try:
            filters = [f"{url}/manifest.json?min_confidence=0.{number}" for number in range(10, 40)]
            asked = [pool.submit(fetch, one) for one in filters]
            wait_for(lambda: sum(one.done() for one in asked) >= 20)
            refused = [one.result() for one in asked if one.done()]
            assert {answer.status for answer in refused} == {503}
            assert {answer.headers["Retry-After"] for answer in refused} == {"5"}
            assert begun[0] == 2, "two at once"
            assert fetch(f"{url}/healthz").status == fetch(f"{url}/metrics").status == 200
            for path in (SHARD, f"{SHARD}?min_confidence=0.99", LABELS, "openapi.json"):
                assert fetch(f"{url}/{path}").status == 200
        finally:
            go_on.set()
        statuses = [one.result().status for one in asked]
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(200) == 10, "two, and eight that waited"


def test_a_filter_is_scanned_once_for_all_host_names_and_spellings(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[RowFilter] = []
    entries = JoinedRun.entries

    def noted(self: JoinedRun, keep: RowFilter) -> Any:
        scanned.append(keep)
        return entries(self, keep)

    monkeypatch.setattr(JoinedRun, "entries", noted)
    with server_thread(catalog(run), open_to_all=True) as url:
        for number in range(12):
            answer = fetch(f"{url}/", {"Host": f"host{number}.example"})
            assert f"http://host{number}.example/shards/".encode() in answer.content
        for query in (
            "classes=3,7&min_confidence=0.5",
            "min_confidence=0.50&classes=7,3,3&selected=true",
            "classes=7,3&min_confidence=5e-1",
        ):
            assert fetch(f"{url}/manifest.json?{query}", {"Host": "x.example"}).status == 200
        for number in range(20):  # do not push out what all ask for
            fetch(f"{url}/manifest.json?min_confidence=0.{number + 10}")
        assert fetch(f"{url}/manifest.json").status == fetch(f"{url}/").status == 200
    assert len(scanned) == 2 + 20
    assert scanned.count(RowFilter()) == 1


def test_pages_for_different_host_names_have_different_etags(run: SmallRun) -> None:
    with server_thread(catalog(run), open_to_all=True) as url:
        first, second = (fetch(f"{url}/", {"Host": name}) for name in ("a.example", "b.example"))
        assert first.headers["ETag"] != second.headers["ETag"]
        again = fetch(f"{url}/", {"Host": "a.example", "If-None-Match": first.headers["ETag"]})
    assert again.status == 304


def test_excluded_keys_are_grouped_once_and_not_per_request(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    served = catalog(run)
    lines = [*(f"key{number}" for number in range(1000)), "unlabeled-000001/00055"]
    many = replace(served, overlay=replace(served.overlay, excluded=ExcludedKeys(lines)))
    first = [many.shard(name, RowFilter()) for name in ("unlabeled-000000", "unlabeled-000001")]
    fewer = len(many.overlay.wanted(1, RowFilter(False)))
    assert fewer == len(served.overlay.wanted(1, RowFilter(False))) - 1
    with monkeypatch.context() as patch:
        patch.setattr(ExcludedKeys, "lines", lambda _: pytest.fail("the list was read"))
        assert [many.shard(name, RowFilter()).etag for name in ("unlabeled-000000", "unlabeled-000001")] == [
            one.etag for one in first
        ]
        many.overlay.wanted(0, RowFilter())
    assert first[0].etag != served.shard("unlabeled-000000", RowFilter()).etag
    other = replace(served.overlay, excluded=ExcludedKeys(reversed(lines)))
    assert other.identity(0, RowFilter()) == many.overlay.identity(0, RowFilter()), "the same lines, the same tag"


def test_a_value_without_waiters_is_not_made_and_frees_its_place() -> None:
    async def go() -> None:
        pool, go_on, made = BlockingPool(1, 1), threading.Event(), list[str]()
        cache = AsyncCache(pool, 2)

        def make(name: str) -> Callable[[], str]:
            def made_now() -> str:
                assert go_on.wait(60)
                made.append(name)
                return name

            return made_now

        first = asyncio.create_task(cache.get("first", make("first")))
        second = asyncio.create_task(cache.get("second", make("second")))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await cache.get("third", make("third"))
        second.cancel()
        with suppress(asyncio.CancelledError):
            await second
        await asyncio.sleep(0.05)
        third = asyncio.create_task(cache.get("third", make("third")))
        too = asyncio.create_task(cache.get("third", make("never")))
        await asyncio.sleep(0)
        third.cancel()
        go_on.set()
        assert await first == "first"
        assert await too == "third", "another client still waits for it"
        assert await cache.get("second", make("second")) == "second", "and it can be made again"
        assert made == ["first", "third", "second"]
        pool.close()

    asyncio.run(go())
