"""Pseudo-labels on a web server: `stage=serve`, or any server with the folder of an export."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal
from urllib.parse import unquote, urljoin, urlsplit

from pydantic import BaseModel, Field, ValidationError

from ...base_names import check_base_name
from ...errors import DataError
from ...json_files import first_problem
from ...shards.split import MANIFEST_NAME
from ...storage.redact import redacted
from ...storage.web_tokens import give_token
from ..overlay import RowFilter
from .archives import Archive, Archives, exported, read_manifest_bytes

FORMAT = "noisy-student-pseudo-labels"
"""Of the manifest that a server writes and this module reads."""


class _ServedShard(BaseModel):
    """A shard in a server's manifest; URLs are relative to the manifest's."""

    url: str
    labels_url: str
    num_samples: int = Field(ge=0)
    sha256: str | None = None


class _Served(BaseModel):
    """`/manifest.json` of `stage=serve`."""

    version: Literal[1]
    kind: Literal["joined", "export"]
    class_names: list[str] | None
    shards: list[_ServedShard]


def open_served(url: str, keep: RowFilter, token: str | None = None) -> Archives:
    """Open the pseudo-labels at this address.

    Raises:
        DataError: its manifest is not one of pseudo-labels, is of another version, or names other servers or folders.
        StorageError: the manifest cannot be read, or `token` is malformed.
    """
    if token is not None:
        give_token(url, token)
    address = urljoin(url.rstrip("/") + "/", MANIFEST_NAME)
    content = read_manifest_bytes(address)
    if not _is_served(content):
        return replace(exported(url, address, content, keep), token=token)
    served = _parse(address, content)
    if served.kind == "joined" and (query := keep.query()):  # let the server filter, so that it sends only what passes
        address += query
        served = _parse(address, read_manifest_bytes(address))
    archives = tuple(_archive(address, entry) for entry in served.shards if entry.num_samples)
    return Archives(archives, tuple(served.class_names) if served.class_names else None, keep, token)


def _is_served(content: bytes) -> bool:
    try:
        return dict(json.loads(content)).get("format") == FORMAT
    except (ValueError, TypeError, RecursionError):
        return False


def _parse(address: str, content: bytes) -> _Served:
    try:
        return _Served.model_validate_json(content)
    except ValidationError as error:
        raise DataError(f"{redacted(address)}: {first_problem(error)}; the server is of another version") from error


def _archive(address: str, entry: _ServedShard) -> Archive:
    url, labels_url = (_below(address, url) for url in (entry.url, entry.labels_url))
    return Archive(url, labels_url, entry.num_samples, entry.sha256)


def _below(address: str, relative: str) -> str:
    """The URL of a file below the manifest's folder. Raises DataError for any other URL, as the token would be sent there."""
    url = urljoin(address, relative)
    if urlsplit(url)[:2] != urlsplit(address)[:2]:
        raise DataError(f"{redacted(address)}: it names {redacted(url)}; expected URLs of the same server")
    home, path = urlsplit(address).path.rpartition("/")[0] + "/", urlsplit(url).path
    if not path.startswith(home):
        raise DataError(f"{redacted(address)}: it names {redacted(url)}; expected URLs below its own folder")
    for part in path.removeprefix(home).split("/"):
        check_base_name(unquote(part), address)
    return url
