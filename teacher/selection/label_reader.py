"""Read the columns of label files that selection needs: in batches, checked, with the reasons that exclude rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data import storage
from data.errors import DataError
from data.labels.exclusions import NOTHING_EXCLUDED, ExcludedKeys
from data.labels.label_files import LabeledShard, fetch_label_file, has_all_samples, open_label_file
from data.tables import TableFile
from teacher.selection.rule import (
    MAX_CONFIDENCE,
    Float32,
    HashGroups,
    Int32,
    Mask,
    SelectError,
    SelectRule,
    UInt32,
    UInt64,
    confidence_key,
)

_BATCH_ROWS = 2**16  # larger batches are no faster and take more memory in every thread
_FILES_AT_ONCE = 8  # of each of as many threads: 13,000 answers after 30 ms each take 6 s
_TYPES = {
    "ordinal": pa.int32(),
    "label": pa.int32(),
    "confidence": pa.float32(),
    "image_hash": pa.uint64(),
    "__key__": pa.string(),
}


@dataclass(frozen=True, eq=False)
class Exclusions:
    """Rows that get no copies whatever their confidence.

    Attributes:
        held_out_samples: ordinals by shard name, near-duplicates of held-out images.
        keys: the user's list.
        hash_groups: too many images with one perceptual hash: those to leave out.
    """

    held_out_samples: Mapping[str, Collection[int]] = field(default_factory=dict)
    keys: ExcludedKeys = NOTHING_EXCLUDED
    hash_groups: HashGroups | None = None

    def digest(self) -> str:
        """SHA-256 of the contents as sets, in hex: order and repeats do not matter."""
        by_shard = sorted(
            (shard, sorted({int(ordinal) for ordinal in ordinals})) for shard, ordinals in self.held_out_samples.items()
        )
        digest = hashlib.sha256(repr((self.keys.lines(), by_shard)).encode("utf-8", "surrogatepass"))
        if groups := self.hash_groups:
            for column in (groups.hash, groups.key, groups.tie):
                digest.update(column.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class LabelRows:
    """One batch of a label file; all arrays are [n].

    Attributes:
        label: int32.
        confidence: float32.
        ordinal: int32; None if not read.
        above: bool, at or above the threshold.
        held_out: bool, excluded as near-duplicates of held-out images. None, as for the next two, if no row of the shard is.
        by_user: bool, excluded by the user.
        look_alike: bool, excluded as one image too many of its perceptual hash.
        image_hash: uint64; None if not read.
    """

    label: Int32
    confidence: Float32
    ordinal: Int32 | None
    above: Mask
    held_out: Mask | None
    by_user: Mask | None
    look_alike: Mask | None
    image_hash: UInt64 | None

    @property
    def key(self) -> UInt32:
        """`confidence_key` of the rows, uint32 [n]."""
        return confidence_key(self.confidence)

    @property
    def eligible(self) -> Mask:
        """Rows at or above the threshold and not excluded, bool [n]."""
        excluded = either(either(self.held_out, self.by_user), self.look_alike)
        return self.above if excluded is None else self.above & ~excluded


@dataclass(frozen=True, eq=False)
class LabelSource:
    """A folder of label files `<shard name>.parquet`, with the rule and exclusions that decide which rows are eligible.

    Attributes:
        labeled: the labels' manifest by shard name; a file that differs from its entry is refused.
    """

    labels_dir: str
    rule: SelectRule
    exclusions: Exclusions = field(default_factory=Exclusions)
    labeled: Mapping[str, LabeledShard] = field(default_factory=dict)

    def read_all(
        self, shards: Iterable[str], *, needs_ordinals: bool = True, needs_hashes: bool = False
    ) -> Iterator[tuple[str, Iterator[LabelRows]]]:
        """Each shard with its rows, as `read` gives them. Files in a store are fetched before their turn, many at once."""
        fetched: Iterable[tuple[str, bytes | None]] = ((shard, None) for shard in shards)
        if not storage.is_local(self.labels_dir):
            fetched = storage.in_parallel(self._fetch, shards, _FILES_AT_ONCE)
        for shard, content in fetched:
            yield shard, self.read(shard, needs_ordinals=needs_ordinals, needs_hashes=needs_hashes, content=content)

    def _fetch(self, shard: str) -> tuple[str, bytes | None]:
        return shard, fetch_label_file(self._url(shard), self.labeled.get(shard))

    def _url(self, shard: str) -> str:
        return storage.join(self.labels_dir, f"{shard}.parquet")

    def read(
        self, shard: str, *, needs_ordinals: bool = True, needs_hashes: bool = False, content: bytes | None = None
    ) -> Iterator[LabelRows]:
        """Read the rows of one label file, in order, in batches.

        Keys are read only if the exclusions have keys, ordinals and hashes only if needed: each column costs seconds. Raises
        SelectError when the file is missing, damaged or of another teacher; a column is missing or has another type; a value is
        out of range.

        Args:
            content: of the file, if it is known.
        """
        path, columns = self._url(shard), _needed_columns(shard, self.exclusions, needs_ordinals, needs_hashes)
        with _open(path, self.labeled.get(shard), content) as file:
            _check_columns(path, file.schema, columns)
            ordinal_is_row = "ordinal" in columns and has_all_samples(file)
            if ordinal_is_row:
                columns.remove("ordinal")
            first = 0
            for batch in file.batches(_BATCH_ROWS, columns):
                ordinal = np.arange(first, first + batch.num_rows, dtype=np.int32) if ordinal_is_row else None
                yield _to_rows(path, shard, batch, ordinal, self)
                first += batch.num_rows


@contextmanager
def _open(path: str, entry: LabeledShard | None, content: bytes | None) -> Iterator[TableFile]:
    try:
        with open_label_file(path, entry, content) as file:
            yield file
    except FileNotFoundError as error:
        raise SelectError(f"{path}: no such label file; run stage=label, it continues where it stopped") from error
    except DataError as error:
        raise SelectError(str(error)) from error


def _needed_columns(shard: str, exclusions: Exclusions, needs_ordinals: bool, needs_hashes: bool) -> list[str]:
    wanted = {
        "ordinal": needs_ordinals or shard in exclusions.held_out_samples or exclusions.hash_groups is not None,
        "image_hash": needs_hashes or exclusions.hash_groups is not None,
        "__key__": len(exclusions.keys) > 0,
    }
    return ["label", "confidence", *(name for name, is_wanted in wanted.items() if is_wanted)]


def _check_columns(path: str, schema: pa.Schema, columns: list[str]) -> None:
    for name in columns:
        found = schema.field(name).type if name in schema.names else "nothing"
        if found != _TYPES[name]:
            raise SelectError(f"{path}: column {name!r} must be {_TYPES[name]} but is {found}; label this shard again")


def _to_rows(path: str, shard: str, batch: pa.RecordBatch, ordinal: Int32 | None, source: LabelSource) -> LabelRows:
    rule, exclusions = source.rule, source.exclusions
    label, confidence = _values(path, batch, "label"), _values(path, batch, "confidence")
    if batch.num_rows:
        _check_range(path, "label", label.min(), label.max(), 0, rule.num_classes - 1)
        _check_range(path, "confidence", confidence.min(), confidence.max(), 0, float(MAX_CONFIDENCE))
    if "ordinal" in batch.schema.names:
        ordinal = _values(path, batch, "ordinal")
    image_hash = _values(path, batch, "image_hash") if "image_hash" in batch.schema.names else None
    held_out = by_user = look_alike = None
    if (ordinals := exclusions.held_out_samples.get(shard)) and ordinal is not None:
        held_out = np.isin(ordinal, np.array(sorted(ordinals), np.int64))
    if exclusions.keys:
        by_user = exclusions.keys.mask(shard, batch.column("__key__"))
    if exclusions.hash_groups is not None and ordinal is not None and image_hash is not None:
        look_alike = exclusions.hash_groups.ranks_below(shard, image_hash, confidence_key(confidence), ordinal)
    above = rule.reaches_threshold(label, confidence)
    return LabelRows(label, confidence, ordinal, above, held_out, by_user, look_alike, image_hash)


def _values(path: str, batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    if column.null_count:
        raise SelectError(f"{path}: column {name!r} has {column.null_count} nulls; label this shard again")
    return np.from_dlpack(column)  # `to_numpy` imports pandas if installed: 35 MB in every process


def _check_range(path: str, name: str, low: float, high: float, minimum: float, maximum: float) -> None:
    if not (minimum <= low and high <= maximum):  # NaN fails too
        raise SelectError(f"{path}: {name} must be between {minimum} and {maximum} but got values from {low} to {high}")


def either(first: Mask | None, second: Mask | None) -> Mask | None:
    """Rows in one mask or the other; None is a mask that is false everywhere."""
    if first is None or second is None:
        return second if first is None else first
    return first | second
