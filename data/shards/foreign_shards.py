"""Shards that this project did not pack.

The index of each is made once. What the indexes say is kept in one file, `shards.json`, so that thousands of shards are opened without
reading theirs. That file is a cache: where it is missing, damaged or of another version, the indexes tell the same.
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
from tqdm import tqdm

from data import storage
from data.errors import DataError
from data.shards.findings import NO_FINDINGS, Findings, findings_of
from data.shards.index import INDEX_SCHEMA, build_index, index_digest
from data.storage import FileInfo
from data.storage.redact import redacted
from data.tables import read_table, write_table

KNOWN_NAME = "shards.json"
_THREADS = 8
_reported: set[str] = set()  # folders of indexes of which was said that some tell no version
logger = logging.getLogger(__name__)


class Known(NamedTuple):
    """A foreign shard as it was when it was indexed.

    Attributes:
        version: as `storage.FileInfo` has it; empty where an earlier version of this project, which kept none, indexed the shard.
    """

    bytes: int
    num_samples: int
    index_sha256: str
    odd_keys: int
    odd_key: str
    version: str = ""
    findings: Findings = NO_FINDINGS


class _File(BaseModel):
    """Versions lie apart from the rest, so that earlier versions of this project read the file, too."""

    shards: dict[str, tuple[int, int, str, int, str]]
    versions: dict[str, str] = {}
    findings: dict[str, Findings] = {}


def read_known(folder: str) -> dict[str, Known]:
    """URL → shard, without those of which an earlier version kept no findings. Raises StorageError, OSError."""
    url = storage.join(folder, KNOWN_NAME)
    try:
        text = storage.read_text_if_there(url)  # an outage raises: it must not read the corpus again
        file = _File.model_validate_json(text or '{"shards": {}}')
    except (ValidationError, UnicodeDecodeError):
        return {}
    return {
        shard: Known(*facts, file.versions.get(shard, ""), file.findings[shard])
        for shard, facts in file.shards.items()
        if shard in file.findings
    }


def write_known(folder: str, known: Mapping[str, Known]) -> None:
    """Keep them, if that is possible: a finished run may lie where nothing can be written."""
    url = storage.join(folder, KNOWN_NAME)
    shards = {shard: facts[:-2] for shard, facts in known.items()}
    findings = {shard: facts.findings.as_json() for shard, facts in known.items()}
    versions = {shard: facts.version for shard, facts in known.items() if facts.version}
    try:
        content = {"schema_version": 1, "shards": shards, "versions": versions, "findings": findings}
        storage.write_text(url, json.dumps(content) + "\n")
    except (OSError, storage.StorageError) as error:
        logger.warning(
            "%s: cannot be written (%s); what was read of the shards is read again next time", redacted(url), error
        )


def open_foreign(folder: str, entries: Mapping[str, FileInfo], reindex: bool) -> dict[str, Known]:
    """What is known of shards that we did not pack, by URL. Each one's index is made once, and kept in `folder` while the shard is the
    same.

    Args:
        entries: URL → what a listing tells of the shard.
        reindex: make all indexes anew.
    """
    if not entries:
        return {}
    known, there = read_known(folder), set(storage.list_names(folder))
    with ThreadPoolExecutor(_THREADS) as pool:
        lost = [url for url in entries if url not in known and foreign_index_name(url) in there]
        told = dict(zip(lost, pool.map(lambda url: _read_known_from_index(folder, url), lost), strict=True))
        before = {url: facts for url, facts in (known | told).items() if facts and foreign_index_name(url) in there}
        todo = [url for url, entry in entries.items() if reindex or not _is_same(before.get(url), entry)]
        _report_indexing(folder, [url for url in todo if url in before], entries, before, reindex)
        made = pool.map(lambda url: _index_foreign(folder, url, entries[url]), todo)
        bar = tqdm(made, total=len(todo), desc="index", unit="shard", delay=5, leave=False)
        indexed = dict(zip(todo, bar, strict=True))
    if indexed or told:
        write_known(folder, known | {url: facts for url, facts in told.items() if facts} | indexed)
    return before | indexed


def _is_same(known: Known | None, entry: FileInfo) -> bool:
    """Whether a shard is the one that was indexed, as far as its listing tells."""
    return (
        known is not None
        and known.bytes == entry.size
        and ("" in (known.version, entry.version) or known.version == entry.version)
    )


def _report_indexing(
    folder: str, again: Sequence[str], entries: Mapping[str, FileInfo], before: Mapping[str, Known], reindex: bool
) -> None:
    """Say which known shards are read again, and, once per folder of indexes, that of some it can't be told whether they should be."""
    if reindex and again:
        logger.warning("index: reading the headers of %d shards again", len(again))
    elif again:
        logger.warning(
            "index: %d of %d shards have another size, modification time or ETag than when they were indexed (the first: %s); "
            "reading their headers again",
            len(again), len(entries), redacted(again[0]),
        )  # fmt: skip
    untold = [url for url, entry in entries.items() if entry.version and url in before and not before[url].version]
    if untold and not reindex and folder not in _reported:
        _reported.add(folder)
        logger.warning(
            "%s: %d shards were indexed by an earlier version, which kept no modification times: one that was replaced by "
            "another of the same size is not noticed. Once, run stage=label verify=true, which reads the headers of all shards",
            redacted(folder), len(untold),
        )  # fmt: skip


def foreign_index_name(url: str) -> str:
    """Name of a foreign shard's index. Splits may have shards of the same name; their indexes lie in one folder."""
    return f"{storage.base_name(url).removesuffix('.tar')}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.parquet"


def _index_foreign(folder: str, url: str, entry: FileInfo) -> Known:
    """Index a shard that we did not pack, with its size and version to tell another one."""
    table, index_url = build_index(url), storage.join(folder, foreign_index_name(url))
    identity = {"shard_bytes": str(entry.size), "shard_version": entry.version}
    table = table.replace_schema_metadata({**table.schema.metadata, **identity})
    found = _known_from(table)
    assert found is not None, "it has all that is asked for"
    try:
        write_table(index_url, table)
    except (OSError, storage.StorageError):  # where nothing can be written, an index that says the same does
        old = _read_known_from_index(folder, url)
        if old is None or old.index_sha256 != found.index_sha256:
            raise
    return found


def _read_known_from_index(folder: str, url: str) -> Known | None:
    """What the index of a foreign shard says of the shard; None for an index that is missing, damaged or too old."""
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
