"""The server's OpenAPI description."""

from __future__ import annotations

from typing import Any

from pipeline.serving.catalog import FORMAT_VERSION, Catalog

_Parameter = tuple[str, dict[str, Any], str]  # name, schema, what it means
_FILTER: list[_Parameter] = [
    ("min_confidence", {"type": "number", "minimum": 0, "maximum": 1}, "labels with less are left out"),
    ("classes", {"type": "string", "pattern": "^[0-9]+(,[0-9]+)*$"}, "class numbers, as in 3,7: others are left out"),
    ("selected", {"type": "boolean", "default": True}, "false: also images that the student was not to see"),
]
_RANGE: list[_Parameter] = [
    ("Range", {"type": "string"}, "one range of bytes"),
    ("If-Range", {"type": "string"}, "the ETag that the range is of"),
    ("If-None-Match", {"type": "string"}, "ETags that the client has"),
    ("If-Match", {"type": "string"}, "ETags of which one must be the file's"),
]
_ERROR = {
    "content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}},
}
_STATUSES = {
    "206": "the range",
    "304": "unchanged",
    "412": "another version is here",
    "416": "the range begins behind the end",
}
_REFUSALS = {
    "400": "a parameter is unknown or out of range; the error says what was expected",
    "401": "a token is needed",
    "404": "no such file",
    "421": "another name than this machine's, and no token",
    "409": "what was served has changed since the server started",
    "502": "the files behind this cannot be read now",
    "503": "no room, or too many new filters; Retry-After says when",
}


def description(catalog: Catalog) -> dict[str, Any]:
    """OpenAPI 3.1, for what a catalog can do."""
    filters = _FILTER if catalog.kind == "joined" else []
    paths = {
        "/": _get("A page for people", "text/html"),
        "/manifest.json": _get("The shards, with counts and URLs under the filter", "application/json", query=filters),
        "/shards/{name}.tar": _get(
            "WebDataset shard: images, .cls and .json", "application/x-tar", ["name"], filters, is_file=True
        ),
        "/labels/{name}.parquet": _get("Its labels", "application/vnd.apache.parquet", ["name"], filters, is_file=True),
        "/samples/{number}": _get("An image of the page", "image/*", ["number"]),
        "/healthz": _get("Whether the server answers; without a token", "text/plain"),
        "/metrics": _get("Counters for Prometheus", "text/plain"),
        "/openapi.json": _get("This description", "application/json"),
        "/{file}": _get("A file of an export: wids.json, _info.json, SHA256SUMS, …", "*/*", ["file"], is_file=True),
    }
    info = {"title": "Noisy Student pseudo-labels", "version": str(FORMAT_VERSION), "description": catalog.title}
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "where the server has a token"},
        "basic": {"type": "http", "scheme": "basic", "description": "the same token as password, for browsers"},
    }
    return {
        "openapi": "3.1.0",
        "info": info,
        "paths": paths,
        "components": {"securitySchemes": schemes},
        "security": [{}, {"bearer": []}, {"basic": []}],
    }


def _get(
    summary: str,
    media_type: str,
    path: list[str] | None = None,
    query: list[_Parameter] | None = None,
    is_file: bool = False,
) -> dict[str, Any]:
    parameters = [_parameter("path", name, {"type": "string"}, "", True) for name in path or []]
    parameters += [_parameter("query", *facts) for facts in query or []]
    parameters += [_parameter("header", *facts) for facts in (_RANGE if is_file else [])]
    answers: dict[str, Any] = {"200": {"description": summary, "content": {media_type: {}}}}
    answers |= {status: {"description": text} for status, text in (_STATUSES if is_file else {}).items()}
    answers |= {status: {"description": text, **_ERROR} for status, text in _REFUSALS.items()}
    answer = {"summary": summary, "parameters": parameters, "responses": answers}
    return {"get": answer, "head": answer}


def _parameter(where: str, name: str, schema: dict[str, Any], text: str, required: bool = False) -> dict[str, Any]:
    return {"in": where, "name": name, "schema": schema, "description": text, "required": required}
