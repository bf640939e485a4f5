"""Begin reads of byte ranges of remote files: many at once, on connections that are kept.

Requests go through `data.storage.range_connections` in fsspec's event loop: s3fs takes 1.7 ms of CPU for one, as long as decoding a
photo. Those that need a proxy, and files whose server redirects or answers in chunks, go through aiohttp. An s3:// file is read by a
URL that botocore signs, once in SIGNED_S.

A read that fails here is no error: the caller reads the same range by `storage.open_read`, which retries, and says what is wrong.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import get_loop
from yarl import URL

from . import remote
from .http import is_http, is_sendable
from .range_connections import RangeConnections, UnusualAnswerError
from .redact import redacted
from .retry import describe, is_transient
from .web_session import CONNECTIONS, certificates, proxy_for, session, timeouts
from .web_tokens import token_for

SIGNED_S = 300.0  # after which a URL is signed again; it is valid for an hour, and temporary credentials for 10 minutes at least
_VALID_S = 3600
MAX_FAILURES, PAUSE_S = 16, 30.0
"""So many failures in a row end reading ahead for so many seconds: a store that has too much to do is asked for one range at a time."""
_CLOSE_S = 5.0

_clients: dict[int, _Client] = {}  # by process; a fork must not touch the connections of its parent
_warned: set[str] = set()
logger = logging.getLogger(__name__)


def can_begin(url: str) -> bool:
    """Whether ranges of a remote file can be begun: s3://, and http(s):// without characters that no URL has."""
    return url.startswith(("s3://", "s3a://")) or (is_http(url) and is_sendable(url))


class RangeFile:
    """A remote file whose ranges are read many at once. Use it in one process."""

    def __init__(self, url: str) -> None:
        """Ask for nothing yet."""
        self._url, self._tag, self._failures, self._paused_until = url, "", 0, 0.0
        self._address, self._valid_until = URL(), 0.0
        self._proxy: str | None = None
        self._lock = asyncio.Lock()
        self._fs: Any = None
        self._path = ""
        if not is_http(url):
            self._fs, self._path = remote.filesystem(url)

    @property
    def is_paused(self) -> bool:
        """Whether no reads should be begun: the store refuses them, or has too much to do."""
        return time.monotonic() < self._paused_until

    def begin(self, offset: int, size: int) -> Future[bytes]:
        """Begin to read `size` bytes at `offset`; the result has exactly so many, of one version of the file."""
        return asyncio.run_coroutine_threadsafe(self._read(offset, size), get_loop())

    async def _read(self, offset: int, size: int) -> bytes:
        try:
            content = await self._ask(offset, size)
        except Exception as error:
            self._failures += 1
            if not is_transient(error):
                self._pause(error, math.inf)
            elif self._failures >= MAX_FAILURES:
                self._pause(error, PAUSE_S)
            raise
        self._failures = 0
        return content

    async def _ask(self, offset: int, size: int) -> bytes:
        if time.monotonic() >= self._valid_until:
            await self._find_address()
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        if self._fs is None and (token := token_for(self._url)):  # aiohttp takes it off a redirect to another origin
            headers["Authorization"] = f"Bearer {token}"
        async with _client().room:
            answered, content = await self._get(headers)
        self._check_version(answered.get("etag") or answered.get("last-modified") or "")
        if not (found := answered.get("content-range", "")).startswith(f"bytes {offset}-"):
            raise ValueError(f"asked for bytes from {offset}, the server answered {found!r}")
        if len(content) != size:
            raise ConnectionError(f"{len(content)} bytes came of {size} at byte {offset}")
        return content

    async def _get(self, headers: dict[str, str]) -> tuple[Mapping[str, str], bytes]:
        """Headers, names in any case, and body of an answer with status 206."""
        unusual, origin = _client().unusual, self._address.origin()
        if origin not in unusual and self._proxy is None and self._address.user is None:
            try:
                return await _client().connections.get(self._address, headers)
            except UnusualAnswerError:
                unusual.add(origin)
        timeout = timeouts(remote.CONNECT_TIMEOUT_S, remote.READ_TIMEOUT_S)
        async with session().get(self._address, headers=headers, proxy=self._proxy, timeout=timeout) as answer:
            answer.raise_for_status()
            if answer.status != 206:
                raise ValueError(f"the server does not answer ranges (status {answer.status})")
            return answer.headers, await answer.read()

    def _check_version(self, tag: str) -> None:
        self._tag = self._tag or tag
        if tag != self._tag:
            raise ValueError("the file was replaced while it was read")

    async def _find_address(self) -> None:
        """Sign the address to ask, unless its signature is still valid."""
        async with self._lock:
            if time.monotonic() < self._valid_until:
                return
            url = self._url if self._fs is None else await _sign(self._fs, self._path)
            self._address = URL(url, encoded=True)  # as it is: the signature covers its form
            self._proxy = proxy_for(self._address)
            self._valid_until = time.monotonic() + SIGNED_S

    def _pause(self, error: Exception, seconds: float) -> None:
        """Begin no reads for a while, and tell so once per server and reason."""
        self._paused_until = time.monotonic() + seconds
        if (what := f"{urlsplit(self._url).netloc} {type(error).__name__}") not in _warned:
            _warned.add(what)
            logger.warning(
                "%s: cannot be read ahead (%s); its images are read one after the other%s",
                redacted(self._url), describe(error), f" for {seconds:.0f} s" if seconds < math.inf else "",
            )  # fmt: skip


async def _sign(fs: Any, path: str) -> str:
    """A URL by which an object can be read, signed by the rules of the store's client (endpoint, region, credentials)."""
    await fs.set_session()
    client = await fs.get_s3(fs.split_path(path)[0])
    # botocore signs URLs by version 2 in its older regions, which refuse it for buckets made since 2020
    client.meta.events.register_first("choose-signer.s3", _as_for_headers, unique_id="noisy-student-sigv4")
    return str(await fs._url(path, expires=_VALID_S, **fs.req_kw))


def _as_for_headers(signature_version: Any, **_: Any) -> Any:
    """Keep the signature's version where a URL is signed."""
    return signature_version if str(signature_version).endswith("-query") else None


@dataclass(frozen=True)
class _Client:
    """This process's plain connections to all servers, and the room for requests on them and on aiohttp's.

    Attributes:
        unusual: origins of servers that redirect or answer in chunks, which plain connections cannot read.
    """

    connections: RangeConnections
    room: asyncio.Semaphore
    unusual: set[URL] = field(default_factory=set)


def _client() -> _Client:
    """This process's; made in the event loop."""
    if (found := _clients.get(os.getpid())) is None:
        found = _Client(RangeConnections(certificates()), asyncio.Semaphore(CONNECTIONS))
        _clients[os.getpid()] = found
        atexit.register(_close)
    return found


def _close() -> None:
    """Close this process's connections, which asyncio would complain of."""

    async def close(client: _Client) -> None:
        client.connections.close()

    if (found := _clients.get(os.getpid())) is not None:
        asyncio.run_coroutine_threadsafe(close(found), get_loop()).result(_CLOSE_S)
