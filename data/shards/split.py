"""What is in the shards: a manifest per folder that we packed, an index per shard (`data.shards.index`), a split made of both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any
from unicodedata import normalize

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from data import storage
from data.errors import DataError as DataError
from data.json_files import first_problem, parse_any
from data.shards.findings import NO_FINDINGS, Findings
from data.shards.foreign_shards import Known, foreign_index_name, open_foreign
from data.shards.index import build_index, index_digest, read_index
from data.storage import FileInfo
from data.storage.http import is_http
from data.storage.redact import redacted

MANIFEST_NAME = "manifest.json"
HASHES_NAME = "hashes.parquet"
INDEX_FOLDER = "index"
_THREADS = 8
_READ_AHEAD = 32  # indexes held in memory
logger = logging.getLogger(__name__)


class ShardRecord(BaseModel, extra="forbid"):
    """One shard in a manifest."""

    name: str
    bytes: int
    num_samples: int
    index_sha256: str
    sha256: str


class Manifest(BaseModel, extra="forbid"):
    """`manifest.json` beside the shards that `data.shards.write` wrote."""

    schema_version: int = 1
    class_names: list[str] | None = None  # in label order; None for unlabeled shards
    shards: list[ShardRecord]


@dataclass(frozen=True)
class Shard:
    """One shard of a split: where it is, what it holds, where its index is.

    Attributes:
        odd_keys: usable samples whose keys tell little; see `build_index`.
        odd_key: the first of them.
        sha256: of the shard, as its manifest has it; empty where none is recorded.
        version: as the shard's listing told it; see `storage.FileInfo`. No part of its identity: a copy is the same shard.
    """

    url: str
    bytes: int
    num_samples: int
    index_url: str
    index_sha256: str
    odd_keys: int = 0
    odd_key: str = ""
    sha256: str = ""
    version: str = field(default="", compare=False)
    findings: Findings = NO_FINDINGS

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

    def indexes(self) -> Iterator[pa.Table]:
        """The index of each shard in order, several read at once: an object store answers after a while. Raises as `Shard.index`."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, len(self.shards), _READ_AHEAD):
                yield from pool.map(Shard.index, self.shards[start : start + _READ_AHEAD])

    @cached_property
    def flawed(self) -> tuple[Shard, ...]:
        """The shards whose indexes tell of something wrong."""
        return tuple(shard for shard in self.shards if shard.findings != NO_FINDINGS)

    def digest(self) -> str:
        """Identity of the content: shard names, bytes, counts and index digests."""
        lines = [f"{s.name} {s.bytes} {s.num_samples} {s.index_sha256}" for s in self.shards]
        return hashlib.sha256("\n".join([*lines, *(self.class_names or ())]).encode()).hexdigest()[:16]


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """The URLs of shards, all of which are there (of those on a web server, which has no listing, the first is asked for). As the
    beginning of `open_split`, in seconds: no index is read or made. Raises as that."""
    urls = storage.expand(patterns)
    _check_names(urls)
    web = [url for url in urls if is_http(url)]
    _entries([*(url for url in urls if not is_http(url)), *web[:1]])
    return urls


def open_split(patterns: str | Sequence[str], index_folder: str, reindex: bool = False) -> Split:
    """The shards behind paths, globs, braces or URLs, in order, each with its index.

    Shards with a manifest beside them use it; others are indexed once, and the index is kept in `index_folder`. It is made anew
    when the shard's size, modification time or ETag is another one.

    Args:
        reindex: make the kept indexes anew in any case, which reads the headers of all these shards.

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
    entries = _entries(urls)
    listed = {url: record for url in urls if (record := records[_folder(url)]) is not None}
    shards = {url: _open_packed(url, entries[url], record) for url, record in listed.items()}
    others = {url: entry for url, entry in entries.items() if url not in listed}
    known = open_foreign(index_folder, others, reindex)
    shards |= {url: _foreign_shard(index_folder, url, known[url], entry) for url, entry in others.items()}
    names = [tuple(m.class_names) for m in manifests.values() if m is not None and m.class_names]
    if len({tuple(normalize("NFC", name) for name in group) for group in names}) > 1:  # as macOS and Linux write them
        raise DataError(f"the folders {sorted(manifests)} have different class names; pack them with the same ones")
    return Split(tuple(shards[url] for url in urls), names[0] if names else None)


def check_packed(split: Split) -> None:
    """Index the packed shards of a split anew, and raise DataError for one of which the index beside it is not true any more."""
    packed = [shard for shard in split.shards if shard.sha256]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda shard: index_digest(build_index(shard.url)), packed)
        for shard, digest in zip(packed, digests, strict=True):
            if digest != shard.index_sha256:
                raise DataError(
                    f"{shard.url}: other samples or labels than when it was packed, though it has as many bytes; restore it, or pack "
                    "again"
                )


def has_recorded_bytes(shard: Shard) -> bool:
    """Whether a packed shard has the SHA-256 that its manifest has of it; reads all of it."""
    with storage.open_read(shard.url) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == shard.sha256


def _entries(urls: Sequence[str]) -> dict[str, FileInfo]:
    """Size and version of each shard; one listing per folder, as asking for 13,000 objects one by one takes minutes. Web servers have
    none."""
    web, others = [url for url in urls if is_http(url)], [url for url in urls if not is_http(url)]
    listings = {folder: storage.list_files(folder) for folder in dict.fromkeys(map(_folder, others))}
    entries = {url: listings[_folder(url)].get(storage.base_name(url)) for url in others}
    with ThreadPoolExecutor(_THREADS) as pool:
        entries |= dict(zip(web, pool.map(_entry, web), strict=True))
    if missing := [url for url, entry in entries.items() if entry is None]:
        raise DataError(f"{missing[0]}: no such shard; check the path, or remove it from the list")
    return {url: entry for url, entry in entries.items() if entry is not None}


def _entry(url: str) -> FileInfo | None:
    try:
        return storage.file_info(url)
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
        raise DataError(f"{url}: damaged, or of another version ({first_problem(error)}); {remedy}") from error


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


def _open_packed(url: str, entry: FileInfo, records: Mapping[str, ShardRecord]) -> Shard:
    """A shard that should be in its folder's manifest: one that is not is a leftover more often than new data."""
    name = storage.base_name(url)
    if (record := records.get(name)) is None:
        raise DataError(
            f"{url}: not in {storage.join(_folder(url), MANIFEST_NAME)}, which lists the shards of its folder; put it into "
            "a folder of its own and name that too (it is indexed then), or remove it"
        )
    if record.bytes != entry.size:
        raise DataError(
            f"{url}: {entry.size} bytes, but its manifest says {record.bytes}; it was cut short or changed: pack it again"
        )
    index_url = storage.join(_folder(url), INDEX_FOLDER, name.removesuffix(".tar") + ".parquet")
    return Shard(
        url, entry.size, record.num_samples, index_url, record.index_sha256, sha256=record.sha256, version=entry.version
    )


def _foreign_shard(folder: str, url: str, known: Known, entry: FileInfo) -> Shard:
    index_url = storage.join(folder, foreign_index_name(url))
    odd = known.odd_keys, known.odd_key
    digest, version = known.index_sha256, entry.version
    return Shard(url, entry.size, known.num_samples, index_url, digest, *odd, version=version, findings=known.findings)
