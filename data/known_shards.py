"""shards.json: what the indexes of foreign shards say, in one file for all, so that thousands are opened without reading theirs.

A cache: where it is missing, damaged or of another version, the indexes tell the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from data import storage
from data.findings import NO_FINDINGS, Findings
from data.redact import redacted

KNOWN_NAME = "shards.json"
logger = logging.getLogger(__name__)


class Known(NamedTuple):
    """A foreign shard as it was when it was indexed.

    Attributes:
        version: as `storage.Entry` has it; empty where an earlier version of this project, which kept none, indexed the shard.
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
