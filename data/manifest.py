"""What is in the shards: one manifest per folder that we packed, one index per shard, and a split made of both.

An index is a Parquet table with one row per sample in shard order: `key`, `extension`, `offset` and `size` of the image member in
the tar (bytes), `label` (null without one), `problem` (empty when there is none). It tells counts without opening a tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from data import storage
from data.http_file import is_http
from data.sample import Sample, has_odd_key, iterate_samples

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


class DataError(ValueError):
    """Shards, a manifest or an index that do not fit; the message names the file and says what to do."""


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
        """The index table. Raises DataError when its digest is not the one recorded."""
        table = pq.read_table(io.BytesIO(storage.read_bytes(self.index_url)))
        if index_digest(table) != self.index_sha256:
            raise DataError(f"{self.index_url}: damaged index (digest differs); delete it and run again")
        return table


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


def index_digest(table: pa.Table) -> str:
    """Digest of an index's content, independent of how Parquet stores it."""
    digest = hashlib.sha256()
    for column in INDEX_SCHEMA.names:
        digest.update("\n".join(map(str, table.column(column).to_pylist())).encode())
    return digest.hexdigest()[:16]


def write_table(url: str, table: pa.Table) -> None:
    """Write a Parquet file atomically."""
    with storage.writing(url) as file:
        pq.write_table(table, file, compression="zstd")


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """The URLs of shards, all of which are there (of those on a web server, which has no listing, the first is asked for). As the
    beginning of `open_split`, in seconds: no index is read or made. Raises as that."""
    urls = storage.expand(patterns)
    _check_names(urls)
    web = [url for url in urls if is_http(url)]
    _sizes([*(url for url in urls if not is_http(url)), *web[:1]])
    return urls


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
    return storage.parent(url)


def _read_manifest(folder: str) -> Manifest | None:
    url = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(url):
        return None
    try:
        return Manifest.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise DataError(
            f"{url}: not a manifest of this project ({error.error_count()} errors); delete it or pack again"
        ) from error


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
        text = storage.read_text_if_there(self._url)  # an outage must not read the corpus again
        try:
            return dict(json.loads(text)["shards"]) if text is not None else {}
        except (ValueError, KeyError):
            return {}  # the indexes tell the same


def foreign_index_name(url: str) -> str:
    """Name of a foreign shard's index. Splits may have shards of the same name; their indexes lie in one folder."""
    return f"{storage.base_name(url).removesuffix('.tar')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"


def _index_foreign(url: str, size: int, index_url: str) -> Shard:
    """A shard that we did not pack: its index is made once and kept, with the shard's size to tell a changed one."""
    table: pa.Table | None = None
    if storage.exists(index_url):
        table = pq.read_table(io.BytesIO(storage.read_bytes(index_url)))
    if table is None or _metadata(table, "shard_bytes") != str(size) or not _metadata(table, "odd_keys"):
        table = build_index(url)
        table = table.replace_schema_metadata({**table.schema.metadata, "shard_bytes": str(size)})
        write_table(index_url, table)
    odd = int(_metadata(table, "odd_keys")), _metadata(table, "odd_key")
    return Shard(url, size, table.num_rows, index_url, index_digest(table), *odd)


def _metadata(table: pa.Table, name: str) -> str:
    return (table.schema.metadata or {}).get(name.encode(), b"").decode()
