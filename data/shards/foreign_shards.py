"""Index shards that this project did not pack.

Each shard is indexed once. `shards.json` caches a summary of all indexes, so that opening thousands of shards reads one file. Where
it is missing, damaged or of another version, the indexes are read instead.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from .. import storage
from ..errors import DataError
from ..progress_bar import ProgressBar
from ..storage import FileInfo
from ..storage.redact import redacted
from ..tables import read_table, write_table
from .findings import NO_FINDINGS, Findings, findings_of
from .index import INDEX_SCHEMA, build_index, index_digest

KNOWN_NAME = "shards.json"
_warned: set[str] = set()  # folders of indexes for which the warning about missing versions was given
logger = logging.getLogger(__name__)


class Known(NamedTuple):
    """A foreign shard as it was when it was indexed.

    Attributes:
        version: as in `storage.FileInfo`; empty where an earlier version of this project, which kept none, indexed the shard.
    """

    bytes: int
    num_samples: int
    index_sha256: str
    odd_keys: int
    odd_key: str
    version: str = ""
    findings: Findings = NO_FINDINGS


class _File(BaseModel):
    """`shards.json`. Versions are apart from the rest, so that earlier versions of this project can read the file."""

    shards: dict[str, tuple[int, int, str, int, str]]
    versions: dict[str, str] = {}
    findings: dict[str, Findings] = {}


def read_known(folder: str) -> dict[str, Known]:
    """URL → shard, without shards whose findings an earlier version did not keep. Raises StorageError, OSError."""
    url = storage.join(folder, KNOWN_NAME)
    try:
        text = storage.read_text_if_there(url)  # an outage raises; it must not lead to reading the corpus again
        file = _File.model_validate_json(text or '{"shards": {}}')
    except (ValidationError, UnicodeDecodeError):
        return {}
    return {
        shard: Known(*facts, file.versions.get(shard, ""), file.findings[shard])
        for shard, facts in file.shards.items()
        if shard in file.findings
    }


def write_known(folder: str, known: Mapping[str, Known]) -> None:
    """Write `shards.json`; only warn when that fails, as a finished run may lie in a read-only folder."""
    url = storage.join(folder, KNOWN_NAME)
    shards = {shard: facts[:-2] for shard, facts in known.items()}
    findings = {shard: facts.findings.as_json() for shard, facts in known.items()}
    versions = {shard: facts.version for shard, facts in known.items() if facts.version}
    try:
        content = {"schema_version": 1, "shards": shards, "versions": versions, "findings": findings}
        storage.write_text(url, json.dumps(content) + "\n")
    except (OSError, storage.StorageError) as error:
        logger.warning("%s: cannot be written (%s); the shards' headers are read again next time", redacted(url), error)


def open_foreign(folder: str, files: Mapping[str, FileInfo], reindex: bool) -> dict[str, Known]:
    """URL → shard, indexing those that are new or changed. Indexes are kept in `folder`.

    Args:
        files: URL → size and version of the shard, from a listing.
        reindex: index all shards again.
    """
    if not files:
        return {}
    known, there = read_known(folder), set(storage.list_names(folder))
    with ThreadPoolExecutor(storage.PARALLEL_REQUESTS) as pool:
        lost = [url for url in files if url not in known and foreign_index_name(url) in there]
        reread = dict(zip(lost, pool.map(lambda url: _read_known_from_index(folder, url), lost), strict=True))
        before = {url: facts for url, facts in (known | reread).items() if facts and foreign_index_name(url) in there}
        todo = [url for url, file in files.items() if reindex or not _is_same(before.get(url), file)]
        _report_indexing(folder, [url for url in todo if url in before], files, before, reindex)
        made = pool.map(lambda url: _index_foreign(folder, url, files[url]), todo)
        bar = ProgressBar(made, total=len(todo), desc="index", unit="shard", delayed=True)
        indexed = dict(zip(todo, bar, strict=True))
    if indexed or reread:
        write_known(folder, known | {url: facts for url, facts in reread.items() if facts} | indexed)
    return before | indexed


def _is_same(known: Known | None, file: FileInfo) -> bool:
    """Whether a shard has the size and version with which it was indexed; a missing version counts as equal."""
    return (
        known is not None
        and known.bytes == file.size
        and ("" in (known.version, file.version) or known.version == file.version)
    )


def _report_indexing(
    folder: str, again: Sequence[str], files: Mapping[str, FileInfo], before: Mapping[str, Known], reindex: bool
) -> None:
    """Warn about known shards that are indexed again, and, once per folder, about shards whose changes cannot be noticed."""
    if reindex and again:
        logger.warning("index: reading the headers of %d shards again", len(again))
    elif again:
        logger.warning(
            "index: %d of %d shards have another size, modification time or ETag than when they were indexed (the first: %s); "
            "reading their headers again",
            len(again), len(files), redacted(again[0]),
        )  # fmt: skip
    untold = [url for url, file in files.items() if file.version and url in before and not before[url].version]
    if untold and not reindex and folder not in _warned:
        _warned.add(folder)
        logger.warning(
            "%s: %d shards were indexed by an earlier version, which kept no modification times: replacing one by "
            "another of the same size goes unnoticed. Once, run stage=label verify=true, which reads the headers of all shards",
            redacted(folder), len(untold),
        )  # fmt: skip


def foreign_index_name(url: str) -> str:
    """Name of a foreign shard's index, with a digest of the URL: shards of several splits may have the same name."""
    return f"{storage.base_name(url).removesuffix('.tar')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"


def _index_foreign(folder: str, url: str, file: FileInfo) -> Known:
    """Index a shard and keep the index, with the shard's size and version in its metadata."""
    table, index_url = build_index(url), storage.join(folder, foreign_index_name(url))
    identity = {"shard_bytes": str(file.size), "shard_version": file.version}
    table = table.replace_schema_metadata({**table.schema.metadata, **identity})
    found = _known_from(table)
    assert found is not None, "a new index has all metadata"
    try:
        write_table(index_url, table)
    except (OSError, storage.StorageError):  # a read-only folder is fine if it has an equal index
        old = _read_known_from_index(folder, url)
        if old is None or old.index_sha256 != found.index_sha256:
            raise
    return found


def _read_known_from_index(folder: str, url: str) -> Known | None:
    """The shard by its index; None for an index that is missing, damaged or of a too early version."""
    try:
        return _known_from(read_table(storage.join(folder, foreign_index_name(url)), "", schema=INDEX_SCHEMA))
    except (DataError, FileNotFoundError):
        return None


def _known_from(table: pa.Table) -> Known | None:
    size, odd_keys = _metadata(table, "shard_bytes"), _metadata(table, "odd_keys")
    if not (size.isdigit() and odd_keys.isdigit() and table.schema.equals(INDEX_SCHEMA)):
        return None
    odd = int(odd_keys), _metadata(table, "odd_key")
    version = _metadata(table, "shard_version")
    return Known(int(size), table.num_rows, index_digest(table), *odd, version, findings_of(table))


def _metadata(table: pa.Table, name: str) -> str:
    return (table.schema.metadata or {}).get(name.encode(), b"").decode()
