"""What is answered to each path."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from data.labels.overlay import RowFilter
from pipeline.serving import metrics
from pipeline.serving.blocking_pool import Kept, Workers
from pipeline.serving.catalog import Catalog, SampleImage, manifest_of
from pipeline.serving.credentials import HOST
from pipeline.serving.items import Item
from pipeline.serving.metrics import Meters
from pipeline.serving.openapi import description
from pipeline.serving.page.page import page_html
from pipeline.serving.ranges import accepts_gzip
from pipeline.serving.sending import Sender, condition

_LAYOUTS, _LABEL_FILES, _MANIFESTS = 64, 32, 16  # kept: some MB each at 10,000 samples a shard, 13,000 shards
_MAGIC = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"RIFF", "image/webp"))


@dataclass(frozen=True)
class Document:
    """A text that is made once: as it is, and compressed."""

    content: bytes
    compressed: bytes
    digest: str

    @staticmethod
    def of(make: Callable[[], str]) -> Document:
        """With what `make` gives; blocks."""
        content = make().encode()
        return Document(content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:32])


class Handlers:
    """The routes of one server.

    Args:
        needs_token: for the examples on the page.
    """

    def __init__(self, catalog: Catalog, workers: Workers, meters: Meters, needs_token: bool = False) -> None:
        self._catalog, self._workers, self._meters, self._needs_token = catalog, workers, meters, needs_token
        self._sender = Sender(workers.sending, meters)
        self._layouts, self._label_files = Kept(workers.making, _LAYOUTS), Kept(workers.making, _LABEL_FILES)
        self._everything, self._manifests = Kept(workers.scanning, 1), Kept(workers.scanning, _MANIFESTS)
        self._samples, self._texts = Kept(workers.making, 1), Kept(workers.making, 2)
        self._any_url = (
            f"http://{secrets.token_hex(16)}.invalid"  # in the page that is kept, for the name it is asked for under
        )

    def routes(self) -> dict[str, Handler]:
        """Path → handler."""
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
        """What there is; under a filter, with its counts and URLs."""
        document = await self._manifest(self._catalog.parse(list(request.query.items())))
        return await self._answer(request, document, "application/json")

    async def shard(self, request: web.Request) -> web.StreamResponse:
        """Images with their labels."""
        keep = self._catalog.parse(list(request.query.items()))
        item = self._catalog.shard(request.match_info["name"], keep)
        return await self._sender.send(request, _found(item), self._layouts)

    async def labels(self, request: web.Request) -> web.StreamResponse:
        """Labels alone."""
        keep = self._catalog.parse(list(request.query.items()))
        item = self._catalog.labels(request.match_info["name"], keep)
        return await self._sender.send(request, _found(item), self._label_files)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """A file of an export."""
        item = _found(self._catalog.files.get(request.match_info["file"]))
        self._catalog.parse(list(request.query.items()))
        return await self._sender.send(request, item, self._layouts)

    async def page(self, request: web.Request) -> web.StreamResponse:
        """The page for people."""
        page: str = await self._texts.get("page", partial(self._page, *await self._page_parts()))
        own = page.replace(self._any_url, html.escape(_own_url(request)))
        return await self._answer(request, await self._workers.making.run(Document.of, lambda: own), "text/html")

    async def _page_parts(self) -> tuple[list[SampleImage], Document]:
        return await self._some_samples(), await self._manifest(self._catalog.parse([]))

    def _page(self, samples: list[SampleImage], manifest: Document) -> str:
        return page_html(self._catalog, json.loads(manifest.content), samples, self._any_url, self._needs_token)

    async def sample(self, request: web.Request) -> web.StreamResponse:
        """An image of the page."""
        number, samples = request.match_info["number"], await self._some_samples()
        if number not in map(str, range(len(samples))):
            raise web.HTTPNotFound
        content = await self._workers.making.run(samples[int(number)].read)
        media_type = next((kind for magic, kind in _MAGIC if content.startswith(magic)), "application/octet-stream")
        return await self._sender.send_bytes(request, content, {"Content-Type": media_type})

    async def healthz(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """That the server answers."""
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """Counters for Prometheus."""
        return web.Response(body=self._meters.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        """What is answered, for programs."""
        make = partial(Document.of, lambda: _as_json(description(self._catalog)))
        return await self._answer(request, await self._texts.get("openapi", make), "application/json")

    async def _some_samples(self) -> list[SampleImage]:
        return await self._samples.get("samples", self._catalog.samples)

    async def _manifest(self, keep: RowFilter) -> Document:
        """Made once for a filter, whatever name the server is asked under; that of everything is not pushed out by others."""
        kept = self._everything if keep == RowFilter() else self._manifests
        return await kept.get(keep, partial(Document.of, lambda: _as_json(manifest_of(self._catalog, keep))))

    async def _answer(self, request: web.Request, document: Document, media_type: str) -> web.StreamResponse:
        """The document, compressed for those who can read that; or that the client has it already."""
        compress = accepts_gzip(request.headers)
        etag = f'"{document.digest}{"-gzip" if compress else ""}"'
        headers = {"ETag": etag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
        if status := condition(request, etag):
            return web.Response(status=status, headers=headers)
        headers |= {"Content-Type": f"{media_type}; charset=utf-8"} | ({"Content-Encoding": "gzip"} if compress else {})
        return await self._sender.send_bytes(request, document.compressed if compress else document.content, headers)


def _own_url(request: web.Request) -> str:
    """Where the client found this server; a name that is none is not repeated."""
    return f"{request.scheme}://{request.host if HOST.fullmatch(request.host) else 'localhost'}"


def _found(item: Item | None) -> Item:
    if item is None:
        raise web.HTTPNotFound
    return item


def _as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
