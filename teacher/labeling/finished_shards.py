"""Which shards have labels, so that a label stage can continue without reading every label file.

`journal.json` in the labels folder is a cache, written every half minute, of the entries of the labels' manifest. Of a label file that
it does not list, or lists with another size, the footer is read: label files describe themselves. The journal stays because an entry
has the SHA-256 of the whole file, which no footer can hold: without it a label stage would read all label files again before it ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel

from data import storage
from data.json_files import read_if_usable
from data.labels.label_files import LABELS_MANIFEST, LabeledShard, describe_label_file, read_labels_manifest
from data.labels.label_footers import describe_by_footers
from data.progress_bar import ProgressBar
from data.shards.split import Split

JOURNAL_NAME = "journal.json"
_EVERY_S = 30.0


class Journal:
    """The finished shards of a labels folder, by name, and the result of the teacher's check.

    Attributes:
        shards: the entries of those known by their footers alone have no `sha256`; see `read_unread`.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self._written_at = folder, time.monotonic()
        self.shards: dict[str, LabeledShard] = {}
        self.teacher_check: dict[str, Any] | None = None

    @staticmethod
    def open(folder: str, corpus: Split, made_by: str) -> Journal:
        """Find the finished shards of `corpus`: by its footer, the label file is of this shard (see `LabeledShard.is_of`)."""
        journal, known = Journal(folder), {}
        if storage.exists(storage.join(folder, LABELS_MANIFEST)):
            known = read_labels_manifest(folder)
        journal.teacher_check, cached = _read(folder)
        known |= cached
        journal.shards = _finished(folder, corpus, made_by, known)
        return journal

    def add(self, entry: LabeledShard) -> None:
        """Add a shard whose file is committed and known whole; write the journal every half minute."""
        self.shards[entry.name] = entry
        if time.monotonic() - self._written_at > _EVERY_S:
            self.write()

    def read_unread(self) -> None:
        """Read the label files of which only the footers were read; forget those that are damaged, so that they are made again."""
        unread = [name for name, entry in self.shards.items() if not entry.sha256]
        urls = (_url(self._folder, name) for name in unread)
        found = storage.in_parallel(describe_label_file, urls, storage.PARALLEL_REQUESTS)
        bar = ProgressBar(found, total=len(unread), desc="label: check", unit="file", delayed=True)
        for name, entry in zip(unread, bar, strict=True):
            if entry is None or replace(entry, sha256="") != self.shards[name]:
                _report_damaged(self._folder, name)
                del self.shards[name]
            else:
                self.add(entry)

    def write(self) -> None:
        """Write the journal now."""
        entries = [asdict(entry) for entry in self.shards.values() if entry.sha256]
        content = {"teacher_check": self.teacher_check, "shards": entries}
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
    listed = storage.list_sizes(folder)
    sizes = {name.removesuffix(".parquet"): size for name, size in listed.items() if name.endswith(".parquet")}
    found = {shard.name: known.get(shard.name) for shard in corpus.shards if shard.name in sizes}
    unknown = [name for name, entry in found.items() if entry is None or entry.bytes != sizes[name]]
    footers = describe_by_footers(folder, {f"{name}.parquet": sizes[name] for name in unknown})
    for name, entry in zip(unknown, footers, strict=True):
        found[name] = entry
        if entry is None:
            _report_damaged(folder, name)
    shards = {shard.name: shard for shard in corpus.shards}
    return {name: entry for name, entry in found.items() if entry is not None and entry.is_of(shards[name], made_by)}


def _url(folder: str, shard: str) -> str:
    return storage.join(folder, f"{shard}.parquet")


def _report_damaged(folder: str, shard: str) -> None:
    print(f"label: {_url(folder, shard)} is damaged, cut short or no label file; its shard is labeled again")
