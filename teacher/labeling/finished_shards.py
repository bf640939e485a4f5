"""Which shards have labels, so that a label stage can continue without opening every label file.

`journal.json` in the labels folder is a cache, written every half minute. A label file that it does not list, or lists with another
size, is opened: label files describe themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from data import storage
from data.json_files import read_if_usable
from data.labels.label_files import LABELS_MANIFEST, LabeledShard, describe_label_file, read_labels_manifest
from data.shards.split import Shard, Split

JOURNAL_NAME = "journal.json"
_EVERY_S = 30.0


class Journal:
    """The finished shards of a labels folder, by name, and the result of the teacher's check."""

    def __init__(self, folder: str) -> None:
        self._folder, self._written_at = folder, time.monotonic()
        self.shards: dict[str, LabeledShard] = {}
        self.teacher_check: dict[str, Any] | None = None

    @staticmethod
    def open(folder: str, corpus: Split, made_by: str) -> Journal:
        """Find the finished shards of `corpus`: the label file is whole and of this shard (see `LabeledShard.is_of`)."""
        journal, known = Journal(folder), {}
        if storage.exists(storage.join(folder, LABELS_MANIFEST)):
            known = read_labels_manifest(folder)
        journal.teacher_check, cached = _read(folder)
        known |= cached
        journal.shards = _finished(folder, corpus, made_by, known)
        return journal

    def add(self, entry: LabeledShard) -> None:
        """Add a shard whose file is committed; write the journal every half minute."""
        self.shards[entry.name] = entry
        if time.monotonic() - self._written_at > _EVERY_S:
            self.write()

    def write(self) -> None:
        """Write the journal now."""
        content = {"teacher_check": self.teacher_check, "shards": [asdict(entry) for entry in self.shards.values()]}
        storage.write_text(storage.join(self._folder, JOURNAL_NAME), json.dumps(content) + "\n")
        self._written_at = time.monotonic()


def _read(folder: str) -> tuple[dict[str, Any] | None, dict[str, LabeledShard]]:
    """The teacher's check and the shards; (None, {}) if the journal is missing, damaged or of another version (it is a cache)."""
    content = read_if_usable(storage.join(folder, JOURNAL_NAME), _Content)
    if content is None:
        return None, {}
    return content.teacher_check, {entry.name: entry for entry in content.shards}


class _Content(BaseModel):
    """`journal.json`."""

    teacher_check: dict[str, Any] | None
    shards: list[LabeledShard]


def _finished(folder: str, corpus: Split, made_by: str, known: Mapping[str, LabeledShard]) -> dict[str, LabeledShard]:
    sizes = storage.list_sizes(folder)

    def describe(shard: Shard) -> LabeledShard | None:
        entry, size = known.get(shard.name), sizes[f"{shard.name}.parquet"]
        if entry is None or entry.bytes != size:
            entry = describe_label_file(storage.join(folder, f"{shard.name}.parquet"))
        if entry is None:
            print(
                f"label: {folder}/{shard.name}.parquet is damaged, cut short or no label file; its shard is labeled again"
            )
        return entry if entry and entry.is_of(shard, made_by) else None

    with ThreadPoolExecutor(storage.PARALLEL_REQUESTS) as pool:
        found = pool.map(describe, [shard for shard in corpus.shards if f"{shard.name}.parquet" in sizes])
        return {entry.name: entry for entry in found if entry is not None}
