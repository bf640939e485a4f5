"""This process's HTTP connections to all servers and stores: aiohttp in fsspec's event loop. They are kept between requests."""

from __future__ import annotations

import asyncio
import atexit
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohttp
from fsspec.asyn import get_loop
from yarl import URL

CONNECTIONS = 64
"""Of one process to all servers. 64 answers in 100 ms are 640 images a second, about what a core decodes."""
IDLE_S = 15.0  # after which a connection that is not used is closed; stores do so after 20 s and more
_CLOSE_S = 5.0
BUFFER_BYTES = 1 << 20  # of a connection: an answer that is larger waits for the event loop
_MESSAGE_BYTES = 300  # of an error response's body

_sessions: dict[int, aiohttp.ClientSession] = {}  # by process; a fork must not touch the connections of its parent


class Answer(NamedTuple):
    """A server's answer; `content` is its beginning, of an error at most `_MESSAGE_BYTES`."""

    status: int
    reason: str
    headers: Mapping[str, str]
    content: bytes


def get(url: str, headers: Mapping[str, str], timeout_s: float, max_bytes: int) -> Answer:
    """GET a URL and wait for the first `max_bytes` of the answer; follows redirects, to other origins without Authorization.

    Raises aiohttp.ClientError, OSError.
    """
    future = asyncio.run_coroutine_threadsafe(_get(URL(url, encoded=True), headers, timeout_s, max_bytes), get_loop())
    try:
        return future.result()
    finally:
        future.cancel()  # after Ctrl-C


async def _get(address: URL, headers: Mapping[str, str], timeout_s: float, max_bytes: int) -> Answer:
    options: dict[str, Any] = {"proxy": proxy_for(address), "timeout": timeouts(timeout_s, timeout_s)}
    async with session().get(address, headers={"Accept-Encoding": "identity", **headers}, **options) as answer:
        content, left = [], max_bytes if answer.status < 400 else _MESSAGE_BYTES
        while left > 0 and (part := await answer.content.read(left)):
            content.append(part)
            left -= len(part)
        return Answer(answer.status, answer.reason or "", answer.headers, b"".join(content))


def timeouts(connect_s: float, read_s: float) -> aiohttp.ClientTimeout:
    """For connecting, and for each wait for bytes; the whole answer may take as long as it takes."""
    return aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=read_s)


def session() -> aiohttp.ClientSession:
    """This process's connections; made in the event loop."""
    if (found := _sessions.get(os.getpid())) is None:
        connector = aiohttp.TCPConnector(limit=CONNECTIONS, keepalive_timeout=IDLE_S, ssl=certificates())
        found = aiohttp.ClientSession(connector=connector, auto_decompress=False, read_bufsize=BUFFER_BYTES)
        _sessions[os.getpid()] = found
        atexit.register(_close)
    return found


def _close() -> None:
    """Close this process's connections, which aiohttp would complain of."""
    if (found := _sessions.get(os.getpid())) is not None:
        asyncio.run_coroutine_threadsafe(found.close(), get_loop()).result(_CLOSE_S)


def certificates() -> ssl.SSLContext:
    """The system's certificates, and those of AWS's programs, as small containers have none."""
    context = ssl.create_default_context()
    bundle = os.environ.get("AWS_CA_BUNDLE")
    with suppress(ImportError):
        import certifi

        bundle = bundle or certifi.where()
    if bundle:
        context.load_verify_locations(bundle)
    return context


def proxy_for(address: URL) -> str | None:
    """The proxy of the environment (HTTPS_PROXY, NO_PROXY, …) for an address."""
    proxies = getproxies()
    return None if not proxies or proxy_bypass(str(address.host)) else proxies.get(address.scheme)
