"""What is in the shards: one manifest per folder that we packed, one index per shard, and a split made of both.

An index is a Parquet table with one row per sample in shard order: `key`, `extension`, `offset` and `size` of the image member in
the tar (bytes), `label` (null without one), `problem` (empty when there is none). It tells counts without opening a tar.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from data import storage
from data.errors import DataError as DataError
from data.http_file import is_http
from data.json_files import parse_any, read_json
from data.redact import redacted
from data.sample import Sample, has_odd_key, iterate_samples
from data.tables import read_table
from data.tables import write_table as write_table

MANIFEST_NAME = "manifest.json"
HASHES_NAME = "hashes.parquet"
INDEX_FOLDER = "index"
_KNOWN_NAME = "shards.json"
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("extension", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field("problem", pa.string()),
    ]
)
_INDEX_REMEDY = (
    "if this project packed the shard, pack it again; else delete the index and run again, which makes it anew"
)
logger = logging.getLogger(__name__)


class ShardRecord(BaseModel, extra="forbid"):
    """One shard in a manifest."""

    name: str
    bytes: int
    num_samples: int
    index_sha256: str
    sha256: str


class Manifest(BaseModel, extra="forbid"):
    """`manifest.json` beside the shards that `data.shards` wrote."""

    schema_version: int = 1
    class_names: list[str] | None = None  # in label order; None for unlabeled shards
    shards: list[ShardRecord]


@dataclass(frozen=True)
class Shard:
    """One shard of a split: where it is, what it holds, where its index is."""

    url: str
    bytes: int
    num_samples: int
    index_url: str
    index_sha256: str
    odd_keys: int = 0  # usable samples whose keys tell little: see build_index
    odd_key: str = ""  # the first of them

    @property
    def name(self) -> str:
        """File name without `.tar`; names the label and selection files."""
        return storage.base_name(self.url).removesuffix(".tar")

    def index(self) -> pa.Table:
        """The index table. Raises DataError when it is damaged, or its digest is not the one recorded."""
        return read_index(self.index_url, self.index_sha256)


@dataclass(frozen=True)
class Split:
    """Shards in a fixed order, and the class names if a manifest has them."""

    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def num_samples(self) -> int:
        """Samples in all shards, those with problems included."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def digest(self) -> str:
        """Identity of the content: shard names, bytes, counts and index digests."""
        lines = [f"{s.name} {s.bytes} {s.num_samples} {s.index_sha256}" for s in self.shards]
        return hashlib.sha256("\n".join([*lines, *(self.class_names or ())]).encode()).hexdigest()[:16]


def build_index(url: str) -> pa.Table:
    """Index a shard in one pass over its headers. Problems become rows, not exceptions.

    The table's metadata counts the usable samples whose key occurs before in this shard, names several images (the first is the
    sample's), or could not be written (see `data.sample.check_key`): `odd_keys`, and `odd_key`, the first of them.
    """
    seen: set[str] = set()
    odd: list[str] = []
    rows = []
    with storage.open_read(url) as file:
        for sample in iterate_samples(file):
            rows.append({name: getattr(sample, name) for name in INDEX_SCHEMA.names})
            if _is_odd(sample, seen):
                odd.append(sample.key)
            seen.add(sample.key)
    metadata = {"odd_keys": str(len(odd)), "odd_key": odd[0] if odd else ""}
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA.with_metadata(metadata))


def _is_odd(sample: Sample, seen: set[str]) -> bool:
    return not sample.problem and (sample.key in seen or has_odd_key(sample))


def read_index(url: str, digest: str) -> pa.Table:
    """A shard's index table. Raises DataError when it is damaged, or its digest is not the one recorded."""
    table = read_table(url, _INDEX_REMEDY, schema=INDEX_SCHEMA)
    if index_digest(table) != digest:
        raise DataError(f"{redacted(url)}: damaged index (digest differs); {_INDEX_REMEDY}")
    return table


def index_digest(table: pa.Table) -> str:
    """Digest of an index's content, independent of how Parquet stores it."""
    digest = hashlib.sha256()
    for column in INDEX_SCHEMA.names:
        digest.update("\n".join(map(str, table.column(column).to_pylist())).encode())
    return digest.hexdigest()[:16]


def open_split(patterns: str | Sequence[str], index_folder: str) -> Split:
    """The shards behind paths, globs, braces or URLs, in order, each with its index.

    Shards with a manifest beside them use it; others are indexed once, and the index is kept in `index_folder`.

    Raises:
        DataError: no shard, a missing or changed one, one that the manifest beside it doesn't list, or two with the same name.
        StorageError: a pattern that matches nothing.
    """
    urls = storage.expand(patterns)
    if not urls:
        raise DataError(f"no shards given (patterns: {patterns!r})")
    _check_names(urls)
    manifests = {folder: _read_manifest(folder) for folder in dict.fromkeys(_folder(url) for url in urls)}
    records = {folder: {s.name: s for s in m.shards} if m else None for folder, m in manifests.items()}
    sizes, foreign = _sizes(urls), _ForeignShards(index_folder)

    def open_one(url: str) -> Shard:
        listed = records[_folder(url)]
        return foreign.open(url, sizes[url]) if listed is None else _open_packed(url, sizes[url], listed)

    with ThreadPoolExecutor(8) as pool:
        shards = tuple(
            tqdm(pool.map(open_one, urls), total=len(urls), desc="shards", unit="shard", delay=5, leave=False)
        )
    foreign.write()
    names = [tuple(m.class_names) for m in manifests.values() if m is not None and m.class_names]
    if len(set(names)) > 1:
        raise DataError(f"the folders {sorted(manifests)} have different class names; pack them with the same ones")
    return Split(shards, names[0] if names else None)


def _sizes(urls: Sequence[str]) -> dict[str, int]:
    """Bytes of each shard; one listing per folder, as asking for 13,000 objects one by one takes minutes. Web servers have none."""
    web, others = [url for url in urls if is_http(url)], [url for url in urls if not is_http(url)]
    listings = {folder: storage.list_sizes(folder) for folder in dict.fromkeys(map(_folder, others))}
    sizes = {url: listings[_folder(url)].get(storage.base_name(url)) for url in others}
    with ThreadPoolExecutor(8) as pool:
        sizes |= dict(zip(web, pool.map(_size, web), strict=True))
    if missing := [url for url, size in sizes.items() if size is None]:
        raise DataError(f"{missing[0]}: no such shard; check the path, or remove it from the list")
    return {url: size for url, size in sizes.items() if size is not None}


def _size(url: str) -> int | None:
    try:
        return storage.size(url)
    except FileNotFoundError:
        return None


def _check_names(urls: list[str]) -> None:
    seen: dict[str, str] = {}
    for url in urls:
        name = storage.base_name(url)
        if not name.endswith(".tar"):
            raise DataError(f"{url}: expected a .tar shard")
        if name in seen:
            raise DataError(f"{seen[name]} and {url} have the same file name; labels are kept per name, so rename one")
        seen[name] = url


def _folder(url: str) -> str:
    return url.rpartition("/")[0] or "."


def _read_manifest(folder: str) -> Manifest | None:
    """The manifest beside the shards of a folder; None where there is none, or another program's.

    Raises:
        DataError: ours, but damaged; or no JSON, which may be ours.
        StorageError: it cannot be read, which does not mean that there is none.
    """
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        return None
    content = storage.read_bytes(url)
    remedy = (
        "restore it, or pack these shards again; if another program wrote it, move it out of this folder (then the shards are "
        "indexed without it)"
    )
    try:
        if not _is_ours(parse_any(content, url, remedy)) and not _has_our_indexes(folder):
            _warn_of_foreign_manifest(url)
            return None
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{url}: damaged, or of another version ({where}: {first['msg']}); {remedy}") from error


def _is_ours(content: Any) -> bool:
    """Whether JSON in a file of this name is a manifest of this project: we write all of its fields, so one may be damaged."""
    known = Manifest.model_fields.keys()
    return isinstance(content, dict) and len(content.keys() & known) >= len(known) - 1


def _has_our_indexes(folder: str) -> bool:
    """Whether we packed a folder's shards: their indexes lie beside them. A web server has no folders."""
    return not is_http(folder) and storage.exists(storage.join(folder, INDEX_FOLDER))


@cache  # once for each folder: a command opens its shards several times
def _warn_of_foreign_manifest(url: str) -> None:
    logger.warning("%s is another program's and is not used; the shards beside it are indexed", redacted(url))


def _open_packed(url: str, size: int, records: Mapping[str, ShardRecord]) -> Shard:
    """A shard that should be in its folder's manifest: one that is not is a leftover more often than new data."""
    name = storage.base_name(url)
    if (record := records.get(name)) is None:
        raise DataError(
            f"{url}: not in {storage.join(_folder(url), MANIFEST_NAME)}, which lists the shards of its folder; put it into "
            "a folder of its own and name that too (it is indexed then), or remove it"
        )
    if record.bytes != size:
        raise DataError(
            f"{url}: {size} bytes, but its manifest says {record.bytes}; it was cut short or changed: pack it again"
        )
    index_url = storage.join(_folder(url), INDEX_FOLDER, name.removesuffix(".tar") + ".parquet")
    return Shard(url, size, record.num_samples, index_url, record.index_sha256)


class _ShardsFile(BaseModel):
    """`shards.json`: what the indexes say, by URL."""

    shards: dict[str, list[Any]]


class _ForeignShards:
    """Shards that we did not pack. Each one's index is made once and kept, and what it says is kept in one file for all."""

    def __init__(self, index_folder: str) -> None:
        self._folder, self._url = index_folder, storage.join(index_folder, _KNOWN_NAME)
        self._known: dict[str, list[Any]] = {}
        self._there: set[str] = set()
        self._asked = self._changed = False
        self._lock = threading.Lock()

    def open(self, url: str, size: int) -> Shard:
        """The shard, indexed unless it is known with this size."""
        with self._lock:
            if not self._asked:
                self._known, self._there, self._asked = self._read(), set(storage.list_names(self._folder)), True
        name, known = foreign_index_name(url), self._known.get(url)
        index_url = storage.join(self._folder, name)
        if known is None or known[0] != size or name not in self._there:
            shard = _index_foreign(url, size, index_url)
            self._known[url] = [size, shard.num_samples, shard.index_sha256, shard.odd_keys, shard.odd_key]
            self._changed = True
            return shard
        return Shard(url, size, known[1], index_url, *known[2:])

    def write(self) -> None:
        """Keep what has been learned."""
        if self._changed:
            storage.write_text(self._url, json.dumps({"schema_version": 1, "shards": self._known}) + "\n")

    def _read(self) -> dict[str, list[Any]]:
        try:
            return dict(read_json(self._url, "", _ShardsFile)["shards"])
        except (FileNotFoundError, DataError):
            return {}  # the indexes tell the same


def foreign_index_name(url: str) -> str:
    """Name of a foreign shard's index. Splits may have shards of the same name; their indexes lie in one folder."""
    return f"{storage.base_name(url).removesuffix('.tar')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"


def _index_foreign(url: str, size: int, index_url: str) -> Shard:
    """A shard that we did not pack: its index is made once and kept, with the shard's size to tell a changed one."""
    table: pa.Table | None = None
    with suppress(FileNotFoundError, DataError):  # a damaged one is made again, as one that is gone
        table = read_table(index_url, "", schema=INDEX_SCHEMA)
    if table is None or _metadata(table, "shard_bytes") != str(size) or not _metadata(table, "odd_keys"):
        table = build_index(url)
        table = table.replace_schema_metadata({**table.schema.metadata, "shard_bytes": str(size)})
        write_table(index_url, table)
    odd = int(_metadata(table, "odd_keys")), _metadata(table, "odd_key")
    return Shard(url, size, table.num_rows, index_url, index_digest(table), *odd)


def _metadata(table: pa.Table, name: str) -> str:
    return (table.schema.metadata or {}).get(name.encode(), b"").decode()
