"""Splits: shards in a fixed order, from a manifest per packed folder and an index per shard (`data.shards.index`)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any
from unicodedata import normalize

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from .. import storage
from ..errors import DataError
from ..json_files import first_problem, parse_any
from ..storage import FileInfo
from ..storage.http import is_http
from ..storage.redact import redacted
from .findings import NO_FINDINGS, Findings
from .foreign_shards import Known, foreign_index_name, open_foreign
from .index import build_index, index_digest, read_index

MANIFEST_NAME = "manifest.json"
HASHES_NAME = "hashes.parquet"
INDEX_FOLDER = "index"
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
    """One shard of a split.

    Attributes:
        odd_keys: number of usable samples with odd keys; see `build_index`.
        odd_key: the first odd key.
        sha256: of the shard, by its manifest; empty for a shard without manifest.
        version: as in `storage.FileInfo`. Not compared: a copy is the same shard.
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
        """File name without `.tar`; also the name of the shard's label and selection files."""
        return storage.base_name(self.url).removesuffix(".tar")

    def index(self) -> pa.Table:
        """The index. Raises DataError when it is damaged or not the recorded one."""
        return read_index(self.index_url, self.index_sha256)


@dataclass(frozen=True)
class Split:
    """Shards in a fixed order, and the class names, if a manifest has them."""

    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] | None = None

    @property
    def num_samples(self) -> int:
        """Samples in all shards, including those with problems."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def indexes(self) -> Iterator[pa.Table]:
        """The index of each shard in order; reads several at once. Raises as `Shard.index`."""
        return storage.in_parallel(Shard.index, self.shards, storage.PARALLEL_REQUESTS)

    @cached_property
    def flawed(self) -> tuple[Shard, ...]:
        """The shards with findings."""
        return tuple(shard for shard in self.shards if shard.findings != NO_FINDINGS)

    def digest(self) -> str:
        """Hex digest of shard names, bytes, counts, index digests and class names."""
        lines = [f"{s.name} {s.bytes} {s.num_samples} {s.index_sha256}" for s in self.shards]
        return hashlib.sha256("\n".join([*lines, *(self.class_names or ())]).encode()).hexdigest()[:16]


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """The URLs of shards, after checking that they exist (on a web server, which has no listing, only the first). Takes seconds:
    reads and makes no index. Raises as `open_split`."""
    urls = storage.expand(patterns)
    _check_names(urls)
    web = [url for url in urls if is_http(url)]
    _list_shards([*(url for url in urls if not is_http(url)), *web[:1]])
    return urls


def urls_by_name(patterns: str | Sequence[str]) -> dict[str, str]:
    """Shard name → URL; empty when the shards are gone (labels can travel alone). Raises StorageError when the storage does not answer:
    an outage must not change what is committed."""
    try:
        return {storage.base_name(url).removesuffix(".tar"): url for url in storage.expand(patterns)}
    except storage.MissingError:
        return {}


def open_split(patterns: str | Sequence[str], index_folder: str, reindex: bool = False) -> Split:
    """Open the shards behind paths, globs, braces or URLs, in order, each with its index.

    Shards with a manifest beside them use its facts. Other shards are indexed once and the index is kept in `index_folder`; a shard
    with another size, modification time or ETag is indexed again.

    Args:
        reindex: index all shards without manifest again, which reads their headers.

    Raises:
        DataError: no shard is given, a shard is missing, changed or not in the manifest beside it, or two have the same name.
        StorageError: a pattern matches nothing, or a store does not answer.
    """
    urls = storage.expand(patterns)
    if not urls:
        raise DataError(f"no shards given (patterns: {patterns!r})")
    _check_names(urls)
    manifests = {folder: _read_manifest(folder) for folder in dict.fromkeys(_folder(url) for url in urls)}
    records = {folder: {s.name: s for s in m.shards} if m else None for folder, m in manifests.items()}
    files = _list_shards(urls)
    listed = {url: record for url in urls if (record := records[_folder(url)]) is not None}
    shards = {url: _open_packed(url, files[url], record) for url, record in listed.items()}
    others = {url: file for url, file in files.items() if url not in listed}
    known = open_foreign(index_folder, others, reindex)
    shards |= {url: _foreign_shard(index_folder, url, known[url], file) for url, file in others.items()}
    names = [tuple(m.class_names) for m in manifests.values() if m is not None and m.class_names]
    if len({tuple(normalize("NFC", name) for name in group) for group in names}) > 1:  # as macOS and Linux write them
        raise DataError(f"the folders {sorted(manifests)} have different class names; pack them with the same ones")
    return Split(tuple(shards[url] for url in urls), names[0] if names else None)


def check_packed(split: Split) -> None:
    """Index the packed shards of a split again. Raises DataError for a shard whose index beside it is not right any more."""
    packed = [shard for shard in split.shards if shard.sha256]
    digests = storage.in_parallel(lambda shard: index_digest(build_index(shard.url)), packed, storage.PARALLEL_REQUESTS)
    for shard, digest in zip(packed, digests, strict=True):
        if digest != shard.index_sha256:
            raise DataError(
                f"{shard.url}: other samples or labels than when it was packed, though it has as many bytes; restore it, or pack again"
            )


def has_recorded_bytes(shard: Shard) -> bool:
    """Whether a packed shard has the SHA-256 that its manifest records. Reads the whole shard."""
    with storage.open_read(shard.url) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256  # type: ignore[arg-type]  # it has readinto


def _list_shards(urls: Sequence[str]) -> dict[str, FileInfo]:
    """Size and version of each shard, from one listing per folder: asking for 13,000 objects one by one takes minutes. Web servers
    have no listing."""
    web, others = [url for url in urls if is_http(url)], [url for url in urls if not is_http(url)]
    listings = {folder: storage.list_files(folder) for folder in dict.fromkeys(map(_folder, others))}
    files = {url: listings[_folder(url)].get(storage.base_name(url)) for url in others}
    files |= dict(zip(web, storage.in_parallel(_file_info, web), strict=True))
    if missing := [url for url, file in files.items() if file is None]:
        raise DataError(f"{missing[0]}: no such shard; check the path, or remove it from the list")
    return {url: file for url, file in files.items() if file is not None}


def _file_info(url: str) -> FileInfo | None:
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
    """The manifest of a folder; None when there is none, or one of another program.

    Raises:
        DataError: it is ours and damaged, or no JSON and may be ours.
        StorageError: it cannot be read, so there may be one.
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
    """Whether JSON in a `manifest.json` is ours: it has all our fields, or all but one, as when damaged."""
    known = Manifest.model_fields.keys()
    return isinstance(content, dict) and len(content.keys() & known) >= len(known) - 1


def _has_our_indexes(folder: str) -> bool:
    """Whether a folder has the indexes of packed shards. A web server has no folders."""
    return not is_http(folder) and storage.exists(storage.join(folder, INDEX_FOLDER))


@cache  # once per folder: a command opens its shards several times
def _warn_of_foreign_manifest(url: str) -> None:
    logger.warning("%s is another program's and is not used; the shards beside it are indexed", redacted(url))


def index_url(folder: str, name: str) -> str:
    """The URL of a packed shard's index."""
    return storage.join(folder, INDEX_FOLDER, name.removesuffix(".tar") + ".parquet")


def _open_packed(url: str, file: FileInfo, records: Mapping[str, ShardRecord]) -> Shard:
    """A shard of a folder with a manifest. Raises DataError when the manifest does not list it: most likely a leftover."""
    name = storage.base_name(url)
    if (record := records.get(name)) is None:
        raise DataError(
            f"{url}: not in {storage.join(_folder(url), MANIFEST_NAME)}, which lists the shards of its folder; put it into "
            "a folder of its own and name that too (it is indexed then), or remove it"
        )
    if record.bytes != file.size:
        raise DataError(
            f"{url}: {file.size} bytes, but its manifest says {record.bytes}; it was cut short or changed: pack it again"
        )
    facts = record.num_samples, index_url(_folder(url), name), record.index_sha256
    return Shard(url, file.size, *facts, sha256=record.sha256, version=file.version)


def _foreign_shard(folder: str, url: str, known: Known, file: FileInfo) -> Shard:
    index_url = storage.join(folder, foreign_index_name(url))
    odd = known.odd_keys, known.odd_key
    digest, version = known.index_sha256, file.version
    return Shard(url, file.size, known.num_samples, index_url, digest, *odd, version=version, findings=known.findings)
