"""What is answered to each path."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from data.overlay import RowFilter
from pipeline.serving import metrics
from pipeline.serving.catalog import Catalog, SampleImage, manifest_of
from pipeline.serving.items import Item
from pipeline.serving.metrics import Meters
from pipeline.serving.openapi import description
from pipeline.serving.page import page_of
from pipeline.serving.ranges import is_unchanged
from pipeline.serving.sending import Sender
from pipeline.serving.work import Kept, Work

_LAYOUTS, _LABEL_FILES, _DOCUMENTS = 64, 32, 8  # kept: some MB each at 10,000 samples a shard, 13,000 shards
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")
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
    """The routes of one server."""

    def __init__(self, catalog: Catalog, work: Work, meters: Meters) -> None:
        self._catalog, self._work, self._meters = catalog, work, meters
        self._sender = Sender(work, meters)
        self._layouts, self._label_files = Kept(work, _LAYOUTS), Kept(work, _LABEL_FILES)
        self._documents, self._samples = Kept(work, _DOCUMENTS), Kept(work, 1)

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
        return _answer(request, document, "application/json")

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
        samples, manifest = await self._some_samples(), await self._manifest(self._catalog.parse([]))
        url = _own_url(request)

        def make() -> str:
            return page_of(self._catalog, json.loads(manifest.content), samples, url)

        return _answer(request, await self._documents.get(("page", url), partial(Document.of, make)), "text/html")

    async def sample(self, request: web.Request) -> web.StreamResponse:
        """An image of the page."""
        number, samples = request.match_info["number"], await self._some_samples()
        if number not in map(str, range(len(samples))):
            raise web.HTTPNotFound
        content = await self._work.run(samples[int(number)].read)
        media_type = next((kind for magic, kind in _MAGIC if content.startswith(magic)), "application/octet-stream")
        return web.Response(body=content, content_type=media_type)

    async def healthz(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """That the server answers."""
        return web.Response(text="ok\n")

    async def metrics(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 (aiohttp's interface)
        """Counters for Prometheus."""
        return web.Response(body=self._meters.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        """What is answered, for programs."""
        make = partial(Document.of, lambda: _as_json(description(self._catalog)))
        return _answer(request, await self._documents.get("openapi", make), "application/json")

    async def _some_samples(self) -> list[SampleImage]:
        return await self._samples.get("samples", self._catalog.samples)

    async def _manifest(self, keep: RowFilter) -> Document:
        make = partial(Document.of, lambda: _as_json(manifest_of(self._catalog, keep)))
        return await self._documents.get(("manifest", keep), make)


def _answer(request: web.Request, document: Document, media_type: str) -> web.Response:
    """The document, compressed for those who can read that; or that the client has it already."""
    compress = "gzip" in request.headers.get("Accept-Encoding", "").lower()
    etag = f'"{document.digest}{"-gzip" if compress else ""}"'
    headers = {"ETag": etag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
    if is_unchanged(request.headers, etag):
        return web.Response(status=304, headers=headers)
    headers |= {"Content-Type": f"{media_type}; charset=utf-8"} | ({"Content-Encoding": "gzip"} if compress else {})
    return web.Response(body=document.compressed if compress else document.content, headers=headers)


def _own_url(request: web.Request) -> str:
    """Where the client found this server; a name that is none is not repeated."""
    return f"{request.scheme}://{request.host if _HOST.fullmatch(request.host) else 'localhost'}"


def _found(item: Item | None) -> Item:
    if item is None:
        raise web.HTTPNotFound
    return item


def _as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"
