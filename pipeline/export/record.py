"""Files of an export, each a commit of its own until the export is whole: the file, then a record that says what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import BinaryIO

from pydantic import ValidationError

from data import storage
from data.json_files import read_json
from data.shards.split import DataError, ShardRecord

RECORDS_FOLDER = "records"


class Hashing:
    """A file that is written once, from start to end, with its size and digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        """Append."""
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def sha256(self) -> str:
        """Of what was written, in hex."""
        return self._digest.hexdigest()


def write_record(folder: str, record: ShardRecord) -> ShardRecord:
    """Say that a file of the export is there and whole; the last thing that is written for it."""
    storage.write_text(storage.join(folder, RECORDS_FOLDER, f"{record.name}.json"), record.model_dump_json() + "\n")
    return record


def read_records(folder: str) -> dict[str, ShardRecord]:
    """The files that are there, by name."""
    records = storage.join(folder, RECORDS_FOLDER)
    there = storage.list_sizes(folder)
    found = (_read_record(storage.join(records, name)) for name in storage.list_names(records))
    return {record.name: record for record in found if record and there.get(record.name) == record.bytes}


def _read_record(url: str) -> ShardRecord | None:
    """None for a damaged one: its file is made again."""
    try:
        return ShardRecord.model_validate(read_json(url, ""))
    except (DataError, ValidationError):
        return None


def write_records(folder: str, records: Iterable[ShardRecord]) -> None:
    """Several, of an export that has to be mended."""
    for record in records:
        write_record(folder, record)
