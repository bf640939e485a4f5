"""Pseudo-labels on a web server: what `stage=serve` hands out, or an export in a folder of any server's."""

from __future__ import annotations

import json
from typing import Literal
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ValidationError

from data import storage
from data.labels_of_archives import Archive, Archives, exported
from data.manifest import MANIFEST_NAME, DataError
from data.overlay import RowFilter
from data.redact import redacted

_FORMAT = "noisy-student-pseudo-labels"


class _ServedShard(BaseModel):
    """An entry of a server's manifest; URLs are relative to the manifest's."""

    url: str
    labels_url: str
    num_samples: int
    sha256: str | None = None


class _Served(BaseModel):
    """`/manifest.json` of stage=serve."""

    version: Literal[1]
    kind: Literal["joined", "export"]
    class_names: list[str] | None
    shards: list[_ServedShard]


def open_served(url: str, keep: RowFilter) -> Archives:
    """What is served at this address.

    Raises:
        DataError: no manifest of pseudo-labels there, or one of another version, or one that names other servers.
    """
    address = urljoin(url.rstrip("/") + "/", MANIFEST_NAME)
    content = storage.read_bytes(address)
    if not _is_served(content):
        return exported(url, address, content, keep)
    served = _parse(address, content)
    if served.kind == "joined" and (query := keep.query()):  # filtered there, so that what is not wanted is not sent
        address += query
        served = _parse(address, storage.read_bytes(address))
    archives = tuple(_archive(address, entry) for entry in served.shards if entry.num_samples)
    return Archives(archives, tuple(served.class_names) if served.class_names else None, keep)


def _is_served(content: bytes) -> bool:
    try:
        return dict(json.loads(content)).get("format") == _FORMAT
    except (ValueError, TypeError, RecursionError):
        return False


def _parse(address: str, content: bytes) -> _Served:
    try:
        return _Served.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{redacted(address)}: {where}: {first['msg']}; the server is of another version") from error


def _archive(address: str, entry: _ServedShard) -> Archive:
    urls = [urljoin(address, url) for url in (entry.url, entry.labels_url)]
    for url in urls:
        if urlsplit(url)[:2] != urlsplit(address)[:2]:  # where the token would go, too
            raise DataError(f"{redacted(address)}: it names {redacted(url)}; expected URLs of the same server")
    return Archive(urls[0], urls[1], entry.num_samples, entry.sha256)
