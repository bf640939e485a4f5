"""Handlers of the server's routes."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from data.labels.overlay import RowFilter
from data.shards.samples import image_format
from pipeline.serving.blocking_pool import AsyncCache, Pools
from pipeline.serving.catalog import FORMAT_VERSION, Catalog, SampleImage, ServedFile, manifest_of
from pipeline.serving.credentials import HOST
from pipeline.serving.metrics import CONTENT_TYPE, Metrics
from pipeline.serving.page.page import PageSamples, page_html
from pipeline.serving.request_headers import accepts_gzip, condition_status
from pipeline.serving.sending import Sender

# Sizes of a process's caches. An entry takes a few MB at 10,000 samples per shard and 13,000 shards.
_LAYOUTS, _LABEL_FILES, _MANIFESTS = 16, 32, 16
_MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", None: "application/octet-stream"}


@dataclass(frozen=True)
class Document:
    """A cached text: plain and gzip-compressed."""

    content: bytes
    compressed: bytes
    digest: str

    @staticmethod
    def of(make: Callable[[], str]) -> Document:
        """Build it from the text that `make` returns; blocks."""
        content = make().encode()
        return Document(content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:32])


class Handlers:
    """The handlers of one server.

    Args:
        needs_token: whether the examples on the page send a token.
    """

    def __init__(self, catalog: Catalog, pools: Pools, metrics: Metrics, needs_token: bool = False) -> None:
        self._catalog, self._pools, self._metrics, self._needs_token = catalog, pools, metrics, needs_token
        self._sender = Sender(pools.sending, metrics)
        self._layouts, self._label_files = AsyncCache(pools.making, _LAYOUTS), AsyncCache(pools.making, _LABEL_FILES)
        self._unfiltered, self._manifests = AsyncCache(pools.scanning, 1), AsyncCache(pools.scanning, _MANIFESTS)
        self._samples, self._texts = AsyncCache(pools.making, 1), AsyncCache(pools.making, 2 + _MANIFESTS)
        self._filtered_samples = AsyncCache(pools.scanning, _MANIFESTS)
        # The cached page has this placeholder where each client gets the URL by which it reached the server.
        self._url_placeholder = f"http://{secrets.token_hex(16)}.invalid"

    def routes(self) -> dict[str, Handler]:
        """Map each path to its handler."""
        return {
            "/": self.page,
            "/manifest.json": self.manifest,
            "/shards/{name}.tar": self.shard,
            "/labels/{name}.parquet": self.labels,
            "/samples/{number}": self.sample,
            "/healthz": self.healthz,
            "/metrics": self.metrics,
            "/openapi.json": self.openapi,
            "/{file}": self.file,
        }

    async def manifest(self, request: web.Request) -> web.StreamResponse:
        """List shards, with counts and URLs under the filter."""
        document = await self._manifest(self._catalog.parse(list(request.query.items())))
        return await self._answer(request, document, "application/json")

    async def shard(self, request: web.Request) -> web.StreamResponse:
        """Send images with their labels."""
        row_filter = self._catalog.parse(list(request.query.items()))
        file = self._catalog.shard(request.match_info["name"], row_filter)
        return await self._sender.send(request, _found(file), self._layouts)

    async def labels(self, request: web.Request) -> web.StreamResponse:
        """Send labels without images."""
        row_filter = self._catalog.parse(list(request.query.items()))
        file = self._catalog.labels(request.match_info["name"], row_filter)
        return await self._sender.send(request, _found(file), self._label_files)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """Send another file of an export."""
        file = _found(self._catalog.files.get(request.match_info["file"]))
        self._catalog.parse(list(request.query.items()))
        return await self._sender.send(request, file, self._layouts)

    async def page(self, request: web.Request) -> web.StreamResponse:
        """Send the HTML page; a filter chooses its pictures."""
        row_filter = self._catalog.parse(list(request.query.items()))
        make = partial(self._page, row_filter, *await self._page_parts(row_filter))
        page: str = await self._texts.get(("page", row_filter), make)
        with_url = page.replace(self._url_placeholder, html.escape(_server_url(request)))
        return await self._answer(request, await self._pools.making.run(Document.of, lambda: with_url), "text/html")

    async def _page_parts(self, row_filter: RowFilter) -> tuple[list[SampleImage], Document, Document]:
        shown = await self._some_samples(row_filter), await self._manifest(row_filter)
        return *shown, await self._manifest(RowFilter())

    def _page(self, row_filter: RowFilter, samples: list[SampleImage], matching: Document, manifest: Document) -> str:
        found = PageSamples(row_filter, samples, json.loads(matching.content)["num_samples"])
        return page_html(self._catalog, json.loads(manifest.content), found, self._url_placeholder, self._needs_token)

    async def sample(self, request: web.Request) -> web.StreamResponse:
        """Send an image of the page."""
        row_filter = self._catalog.parse(list(request.query.items()))
        number, samples = request.match_info["number"], await self._some_samples(row_filter)
        if number not in map(str, range(len(samples))):
            raise web.HTTPNotFound
        content = await self._pools.making.run(samples[int(number)].read)
        return await self._sender.send_bytes(request, content, {"Content-Type": _MEDIA_TYPES[image_format(content)]})

    async def healthz(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """Answer that the server is up."""
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """Send Prometheus's metrics."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        """Send the OpenAPI description."""
        make = partial(Document.of, lambda: _as_json(_openapi(self._catalog)))
        return await self._answer(request, await self._texts.get("openapi", make), "application/json")

    async def _some_samples(self, row_filter: RowFilter) -> list[SampleImage]:
        cache = self._samples if row_filter == RowFilter() else self._filtered_samples
        return await cache.get(row_filter, partial(self._catalog.samples, row_filter))

    async def _manifest(self, row_filter: RowFilter) -> Document:
        """Return the manifest, cached by filter; that without a filter has its own cache and is never evicted."""
        cache = self._unfiltered if row_filter == RowFilter() else self._manifests
        return await cache.get(
            row_filter, partial(Document.of, lambda: _as_json(manifest_of(self._catalog, row_filter)))
        )

    async def _answer(self, request: web.Request, document: Document, media_type: str) -> web.StreamResponse:
        """Send a document, gzip-compressed if the client accepts it; or 304 or 412."""
        compress = accepts_gzip(request.headers)
        etag = f'"{document.digest}{"-gzip" if compress else ""}"'
        headers = {"ETag": etag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
        if status := condition_status(request.headers, etag):
            return web.Response(status=status, headers=headers)
        headers |= {"Content-Type": f"{media_type}; charset=utf-8"} | ({"Content-Encoding": "gzip"} if compress else {})
        return await self._sender.send_bytes(request, document.compressed if compress else document.content, headers)


def _server_url(request: web.Request) -> str:
    """Return the URL by which the client reached this server; an invalid Host is not echoed."""
    return f"{request.scheme}://{request.host if HOST.fullmatch(request.host) else 'localhost'}"


def _found(file: ServedFile | None) -> ServedFile:
    if file is None:
        raise web.HTTPNotFound
    return file


def _as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


def _openapi(catalog: Catalog) -> dict[str, Any]:
    """Return `openapi.json` for this catalog: HEAD beside GET, filters only where labels are joined."""
    document: dict[str, Any] = json.loads(
        files("pipeline.serving").joinpath("openapi.json").read_text(encoding="utf-8")
    )
    document["info"] |= {"version": str(FORMAT_VERSION), "description": catalog.title}
    parameters = document["components"]["parameters"]
    unused = {name for name, one in parameters.items() if one["in"] == "query" and catalog.kind != "joined"}
    for path in document["paths"].values():
        get = path["head"] = path["get"]
        get["parameters"] = [one for one in get["parameters"] if one["$ref"].rpartition("/")[2] not in unused]
    document["components"]["parameters"] = {name: one for name, one in parameters.items() if name not in unused}
    return document
