"""The overlay: a run's labels and selection over its unlabeled shards. Decides which rows are handed out, and as which samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa

from .. import storage
from ..errors import DataError
from ..shards.split import Shard
from ..tables import parse_table, read_whole
from .exclusions import NOTHING_EXCLUDED, ExcludedKeys
from .joined_tar import LabelEntries, Provenance, Rows
from .label_files import (
    LABEL_COLUMNS,
    LABELS_REMEDY,
    LabeledShard,
    copies_digests,
    read_copies,
    read_labels,
    read_labels_manifest,
)

FILTER_COLUMNS = ("label", "confidence")
_DIGEST_CHARACTERS = 64  # of a SHA-256 in hex


@dataclass(frozen=True)
class RowFilter:
    """Which label rows to hand out.

    Attributes:
        selected: only rows with copies > 0, which the student sees; False: all.
        min_confidence: only rows with confidence ≥ this.
        classes: only rows with these labels; None: all.
    """

    selected: bool = True
    min_confidence: float = 0.0
    classes: frozenset[int] | None = None

    def matches(self, label: np.ndarray | int, confidence: np.ndarray | float, copies: np.ndarray | int) -> np.ndarray:
        """Which rows pass: bool [n] for columns [n]; bool [] for the values of one row."""
        wanted = np.asarray(confidence, np.float32) >= np.float32(self.min_confidence)
        if self.selected:
            wanted = wanted & (np.asarray(copies) > 0)
        if self.classes is not None:
            wanted = wanted & np.isin(label, sorted(self.classes))
        return np.asarray(wanted)

    def query(self) -> str:
        """The filter as a URL query for `stage=serve`, equal for equal filters; empty for the default filter."""
        values: dict[str, str] = {}
        if self.min_confidence > 0:
            values["min_confidence"] = repr(self.min_confidence)
        if self.classes is not None:
            values["classes"] = ",".join(map(str, sorted(self.classes)))
        if not self.selected:
            values["selected"] = "false"
        return f"?{urlencode(values, safe=',')}" if values else ""

    def digest(self) -> str:
        """Hex digest; equal for equal filters."""
        classes = sorted(self.classes) if self.classes is not None else None
        return hashlib.sha256(repr((self.selected, float(self.min_confidence), classes)).encode()).hexdigest()[:16]


def read_committed(labels_dir: str, selection: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, LabeledShard]]:
    """`Overlay.digests` and `Overlay.committed` from the labels' manifest and the selection's done-record.

    Raises:
        DataError: the manifest is damaged, or the selection lacks a shard.
    """
    entries, copies = read_labels_manifest(labels_dir), copies_digests(selection)
    if missing := entries.keys() - copies.keys():
        raise DataError(f"{labels_dir}: the selection does not have shard {min(missing)!r}; run stage=select again")
    return {name: entry.sha256 + copies[name] for name, entry in entries.items()}, entries


@dataclass(frozen=True)
class Overlay:
    """Labels and a selection over unlabeled shards; can be pickled.

    Attributes:
        labels_dir, selection_dir: folders of `<shard name>.parquet`.
        digests: by shard name, the SHA-256 of the label file and that of the column of copies, concatenated.
        excluded: the user's list of keys.
        committed: entries of the labels' manifest by shard name, to refuse other files under their names.
    """

    shards: tuple[Shard, ...]
    labels_dir: str
    selection_dir: str
    provenance: Provenance
    digests: Mapping[str, str]
    excluded: ExcludedKeys = NOTHING_EXCLUDED
    committed: Mapping[str, LabeledShard] = field(default_factory=dict)

    def files(self, position: int) -> tuple[str, str]:
        """URLs of a shard's label file and of its column of copies."""
        name = f"{self.shards[position].name}.parquet"
        return storage.join(self.labels_dir, name), storage.join(self.selection_dir, name)

    def is_as_committed(self, position: int) -> bool:
        """Whether a shard's files exist and have the recorded digests."""
        try:
            found = [hashlib.sha256(storage.read_bytes(url)).hexdigest() for url in self.files(position)]
        except FileNotFoundError:
            return False
        return "".join(found) == self.digests[self.shards[position].name]

    def copies(self, position: int) -> np.ndarray:
        """How often the student sees each label row of a shard, uint16 [rows]. Raises DataError if the file is another one."""
        digest = self.digests[self.shards[position].name][_DIGEST_CHARACTERS:]
        return read_copies(self.files(position)[1], digest)

    def wanted(self, position: int, keep: RowFilter) -> np.ndarray:
        """Positions of a shard's label rows that pass `keep` and are not excluded by the user, int [n].

        Raises:
            DataError: labels and copies differ in length, or are not the committed files.
        """
        columns = (*FILTER_COLUMNS, "__key__") if self.excluded else FILTER_COLUMNS
        entry = self.committed.get(self.shards[position].name)
        labels = read_labels(self.files(position)[0], columns, entry)
        return self._wanted(position, keep, labels, self.copies(position))

    def _wanted(self, position: int, keep: RowFilter, labels: pa.Table, copies: np.ndarray) -> np.ndarray:
        if len(copies) != labels.num_rows:
            url = self.files(position)[0]
            raise DataError(f"{url}: {labels.num_rows} labels, but {len(copies)} copies; run stage=select again")
        mask = keep.matches(labels.column("label").to_numpy(), labels.column("confidence").to_numpy(), copies)
        if self.excluded:
            mask &= ~self.excluded.mask(self.shards[position].name, labels.column("__key__").combine_chunks())
        return np.flatnonzero(mask)

    def take(self, position: int, rows: np.ndarray) -> Rows:
        """Label rows of the shard at `position`.

        Args:
            rows: positions in the label file, int [n].

        Raises:
            DataError: the label file does not fit the index, or is not the committed one.
        """
        return self._take(position, rows, self._labels(position), self.copies(position))

    def rows(self, position: int, keep: RowFilter) -> Rows:
        """The rows of the shard at `position` to hand out. Raises as `wanted` and `take`."""
        labels, copies = self._labels(position), self.copies(position)
        return self._take(position, self._wanted(position, keep, labels, copies), labels, copies)

    def _labels(self, position: int) -> pa.Table:
        url, digest = self.files(position)[0], self.digests[self.shards[position].name][:_DIGEST_CHARACTERS]
        return parse_table(read_whole(url, digest, LABELS_REMEDY), url, LABELS_REMEDY, LABEL_COLUMNS)

    def _take(self, position: int, rows: np.ndarray, labels: pa.Table, copies: np.ndarray) -> Rows:
        shard, labels = self.shards[position], labels.take(pa.array(rows))
        ordinals, index = labels.column("ordinal"), shard.index()
        if len(rows) and ordinals.to_numpy().max() >= index.num_rows:
            raise DataError(f"{self.files(position)[0]}: more labels than {shard.url} has images; run stage=label")
        extension, zeros = index.column("extension").take(ordinals), np.zeros(len(rows), np.int64)
        return Rows(labels, zeros + position, copies[rows], zeros, extension)

    def entries(self, rows: Rows) -> LabelEntries:
        """Rows as samples of an archive."""
        return LabelEntries(rows, [shard.name for shard in self.shards], self.provenance)

    def identity(self, position: int, keep: RowFilter) -> str:
        """Hex digest of everything that a joined shard's bytes depend on, for an ETag."""
        shard = self.shards[position]
        facts: tuple[Any, ...] = (
            shard.name,
            shard.bytes,
            shard.version,
            shard.index_sha256,
            self.digests[shard.name],
            self.provenance,
            keep.digest(),
            self.excluded.digest
            if self.excluded
            else [],  # an empty list keeps ETags of earlier versions when nothing is excluded
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
